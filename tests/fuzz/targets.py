"""Every decoder of foreign bytes: a function that takes any bytes, and valid examples to start from.

A target lets nothing out but the error that the decoder promises; whatever else it raises is a bug.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import torch

from tarragon.checkpoint import messages as bucket_messages
from tarragon.checkpoint.bucket import Bucket, BucketShape, slots_at
from tarragon.config import ConfigError
from tarragon.config import load as load_config
from tarragon.gateway.limits import Limits, check_request
from tarragon.gateway.refusal import Refusal
from tarragon.messages import (
    DataFrame,
    DataKind,
    ExpertId,
    Hello,
    Peer,
    ProbeOpen,
    ProtocolError,
    Report,
    Table,
    Welcome,
    decode_control,
    encode_control,
    pack_data,
    unpack_data,
)
from tarragon.models.headers import ModelError, read_header
from tarragon.native.records import Commit
from tarragon.native.segments import segment_read
from tarragon.security.keys import KeyFileError, read_keys
from tarragon.transport.frames import FrameReader, encode_header
from tarragon.transport.handshake import DialerHandshake, HandshakeError, ListenerHandshake
from tarragon.transport.link import Accepted, Offer, decode_answer, decode_offer
from tarragon.transport.memory import create_sealed
from tarragon.transport.probe import ANSWER, PROBE_FRAME_BYTES, pack_probe, probe_open, unpack_answer
from tarragon.transport.region import Region, RegionShape


class Target(NamedTuple):
    """What is fuzzed, and where from."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


_SECRET: Final = b"s" * 32
_FRAME_BYTES_MAX: Final = 4_096
_PEER: Final = Peer(worker_id="ew-0", role="expert", epoch=3, address="\0a")
_REGION: Final = RegionShape("float32", hidden=4, pairs_max=2)
_BUCKET: Final = BucketShape(
    layers=2,
    slots=8,
    row_bytes=16,
    records=2,
    blocks_max=4,
    block_sizes=(2,),
    layer_groups=(0, 0),
    fingerprint="f",
)


# ------------------------------------------------------------------ messages


def control(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_control(data)
    probe_open(data)


def data_frames(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        frame = unpack_data(data)
        assert pack_data(frame)[:16] == data[:16]


def frames(data: bytes) -> None:
    reader = FrameReader(_FRAME_BYTES_MAX)
    with contextlib.suppress(ProtocolError):
        while data:
            space = reader.space()
            assert 0 < space.nbytes <= _FRAME_BYTES_MAX
            count = min(len(data), space.nbytes)
            space[:count] = data[:count]
            data = data[count:]
            reader.received(count)


def offers(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert decode_offer(data).shape.total_bytes < 1 << 42
    with contextlib.suppress(ProtocolError):
        decode_answer(data)


def probes(data: bytes) -> None:
    if len(data) == PROBE_FRAME_BYTES:
        with contextlib.suppress(ProtocolError):
            unpack_answer(data, 3)


def handshakes(data: bytes) -> None:
    for side in (DialerHandshake(_SECRET), ListenerHandshake(_SECRET)):
        rest = data
        with contextlib.suppress(HandshakeError):
            while side.wanted and rest:
                message, rest = rest[: side.wanted], rest[side.wanted :]
                side.step(message)
        assert side.wanted, "nobody guesses the proof"


def buckets(data: bytes) -> None:
    """Messages about buckets."""
    with contextlib.suppress(ProtocolError):
        bucket_messages.decode(data)


# ------------------------------------------------------------------ shared memory


def region(data: bytes) -> None:
    """A memory file of any size under a shape that says another."""
    fd = create_sealed("fuzz", max(1, len(data)))
    try:
        os.pwrite(fd, data, 0)
        with contextlib.suppress(ProtocolError):
            Region.map(fd, _REGION).close()
    finally:
        os.close(fd)


def _bucket_with(patches: bytes) -> int:
    """The file of a sound bucket with one committed record, some of whose bytes are overwritten."""
    fd = create_sealed("fuzz", _BUCKET.total_bytes)
    bucket = Bucket.map(fd, _BUCKET)
    bucket.open_record(0, "r", 1)
    table = torch.arange(1, 5, dtype=torch.int32)[None]
    none = torch.zeros(1, dtype=torch.int32)
    Commit(bucket.records, bucket.seal_word, [0], none, [table], _BUCKET.block_sizes)([6])
    for place, value in struct.iter_unpack("<IB", patches[: len(patches) // 5 * 5]):
        # The header, and the records behind it; rows are bytes without a meaning.
        os.pwrite(fd, bytes([value]), place % (_BUCKET.records_offset + 1_024))
    return fd


def bucket_memory(data: bytes) -> None:
    """A bucket whose header and records somebody has overwritten is refused, or read within its bounds."""
    fd = _bucket_with(data)
    try:
        with contextlib.suppress(ProtocolError):
            bucket = Bucket.map(fd)
            record = bucket.find("r", 1)
            if record is None:
                return
            shape = bucket.shape
            for layer, group in enumerate(shape.layer_groups):
                size, blocks = shape.block_sizes[group], record.blocks[group]
                slots = slots_at(blocks, size, np.arange(record.positions))
                row = torch.empty(len(slots), shape.row_bytes // 2, dtype=torch.uint8)
                with contextlib.suppress(ValueError):  # what the native side says of a slot beyond the end
                    segment_read(bucket.rows[layer], bucket.checks[layer], slots, row, row.clone())
    finally:
        os.close(fd)


# ------------------------------------------------------------------ the gateway's wire and HTTP


def gateway_wire(data: bytes) -> None:
    from tarragon.gateway import wire

    for receives in (wire.FROM_GATEWAY, wire.FROM_WORKER):
        with contextlib.suppress(ProtocolError):
            wire.Codec(receives).decode(data)


def _wire_seeds() -> tuple[bytes, ...]:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

    from tarragon.gateway import wire

    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=3),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    outputs = EngineCoreOutputs(outputs=[EngineCoreOutput(request_id="r", new_token_ids=[4])])
    messages: list[wire.Message] = [
        wire.Attach(gateway_epoch=1, worker_epoch=2),
        wire.Facts(worker_id="aw-0", epoch=1, max_model_len=9, num_gpu_blocks=3, block_size=16),
        wire.Add(attempt=1, request=request, sent=[1], origins=[wire.Origin("aw-1", 2, 3)]),
        wire.Hold({"r": 1}),
        wire.Abort({"r": 1}),
        wire.Outputs({"r": 1}, outputs),
        wire.Utility(1, "reset_prefix_cache", [True, None]),
        wire.UtilityResult(1, True),
    ]
    codec = wire.Codec(wire.FROM_GATEWAY)
    return tuple(b"".join(bytes(part) for part in codec.encode(message)) for message in messages)


_LIMITS: Final = Limits(8, 4, 4, 4, 16, 4, 64, 64)
_KNOWN: Final = frozenset(
    ["prompt", "messages", "n", "stop", "bad_words", "logit_bias", "response_format", "tools"]
)


def request_bodies(data: bytes) -> None:
    with contextlib.suppress(Refusal):
        check_request(data, _KNOWN, _LIMITS)


# ------------------------------------------------------------------ files


def configuration(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ConfigError):
            load_config(Path(file.name), environ={})


def key_files(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(KeyFileError):
            keys = read_keys(file.name, "NONE", {})
            assert all(16 <= len(key) <= 1_024 for key in keys)


def safetensors_headers(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ModelError):
            for stored in read_header(Path(file.name)).values():
                assert stored.start + stored.nbytes <= len(data)


def _safetensors() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


_offer = Offer(worker_id="aw-0", epoch=1, peer_epoch=2, shape=_REGION)
_table = Table(version=1, workers=[_PEER], candidates=[[[0]]])
_bucket_message = bucket_messages.Bucket(worker_id="aw-0", epoch=1, total_bytes=4_096)

TARGETS: Final[dict[str, Target]] = {
    "control": Target(
        control,
        tuple(
            map(
                encode_control,
                (
                    Hello(worker_id="ew-1", role="expert", epoch=3, pid=4, address="\0a"),
                    Welcome(table=_table, assigned=[ExpertId(0, 1)], order=1, peers=[_PEER]),
                    Report(worker_id="ew-1", epoch=3, counters={"pairs": 1.0}, expert_pairs=[[1, 2]]),
                    ProbeOpen(sender_id="aw-0", sender_epoch=1, receiver_epoch=2),
                ),
            )
        ),
    ),
    "data_frames": Target(data_frames, (pack_data(DataFrame(DataKind.ROWS, 1, 2, 3, 4, 5)),)),
    "frames": Target(frames, (encode_header(5, _FRAME_BYTES_MAX) + b"hello",)),
    "offers": Target(offers, (msgspec.msgpack.encode(_offer), msgspec.msgpack.encode(Accepted(epoch=1)))),
    "probes": Target(probes, (pack_probe(ANSWER, 3, 4, 5),)),
    "handshakes": Target(handshakes, (DialerHandshake(_SECRET).opening,)),
    "buckets": Target(buckets, (bucket_messages.encode(_bucket_message),)),
    "region": Target(region, (bytes(_REGION.total_bytes),)),
    "bucket_memory": Target(bucket_memory, (struct.pack("<IB", 64, 7), struct.pack("<IB", 16_384 + 16, 1))),
    "gateway_wire": Target(gateway_wire, _wire_seeds()),
    "request_bodies": Target(request_bodies, (b'{"prompt": ["x"], "n": 2, "stop": ["a"]}',)),
    "configuration": Target(configuration, (b'[tarragon]\nport = 9000\nhost = "::1"\n',)),
    "key_files": Target(key_files, (b"# a comment\n0123456789abcdef\n",)),
    "safetensors_headers": Target(safetensors_headers, (_safetensors(),)),
}
