"""Every decoder against mutated and random bytes; `make fuzz` does the same for longer, led by coverage."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.targets import TARGETS

EXAMPLES = 100


def mutations(seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """One of ``seeds`` with bytes overwritten, cut, doubled or appended; or bytes out of nowhere."""

    def edit(seed: bytes, changes: list[tuple[int, int]], start: int, stop: int, tail: bytes) -> bytes:
        raw = bytearray(seed)
        for place, value in changes:
            raw[place % len(raw)] = value
        cut = sorted((start % (len(raw) + 1), stop % (len(raw) + 1)))
        return bytes(raw[: cut[1]]) + bytes(raw[cut[0] :]) + tail

    place = st.integers(0, 1 << 16)
    byte = st.integers(0, 255)
    edited = st.builds(
        edit,
        st.sampled_from(seeds),
        st.lists(st.tuples(place, byte), max_size=6),
        place,
        place,
        st.binary(max_size=16),
    )
    return st.one_of(edited, st.binary(max_size=400))


@pytest.mark.parametrize("name", TARGETS)
def test_no_decoder_stumbles(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(target.seeds))
    def run(data: bytes) -> None:
        target.run(data)

    run()
    for seed in target.seeds:
        target.run(seed)


def test_the_seeds_are_valid() -> None:
    """Mutations of what is refused at once would test little."""
    from tarragon.gateway import wire
    from tarragon.messages import decode_control, unpack_data
    from tarragon.transport.link import decode_offer

    for seed in TARGETS["control"].seeds:
        decode_control(seed)
    unpack_data(TARGETS["data_frames"].seeds[0])
    decode_offer(TARGETS["offers"].seeds[0])
    kinds = set()
    for seed in TARGETS["gateway_wire"].seeds:
        for receives in (wire.FROM_GATEWAY, wire.FROM_WORKER):
            if wire.Kind(seed[0]) in receives:
                kinds.add(type(wire.Codec(receives).decode(seed)))
    assert len(kinds) == len(TARGETS["gateway_wire"].seeds)
