"""What a simulated cluster does and how long it takes: timings, traffic and faults."""

from __future__ import annotations

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Ranges are inclusive; a "share" is a probability; "pairs" are (token, expert) rows of one layer."""

    moe_layers: int = 12
    steps: int = 20
    """Forward passes of each attention worker."""
    decode_pairs: tuple[int, int] = (16, 64)
    prompt_pairs: tuple[int, int] = (100, 3000)
    prompt_share: float = 0.0
    """Steps that compute a prompt. Those beyond ``decode_pairs_max`` count as prefill."""
    pause_share: float = 0.05
    """Steps after which the worker has nothing to do for up to ``pause_us``."""
    pause_us: int = 10_000

    layer_us: int = 1_000
    """Attention, gate and combine of one layer of a decode step."""
    layer_pair_us: float = 2.0
    """The same, for every pair."""
    jitter: float = 0.2
    """Times on attention workers vary evenly by this part."""
    paces: tuple[float, ...] = (1.0,)
    """Factors of the times on attention workers, taken in turn."""
    between_steps_us: int = 2_000
    """Sampling and scheduling."""
    link_us: int = 20

    batch_us: int = 1_000
    """An expert worker's batch, of any size: reading the weights."""
    batch_pair_us: float = 5.0
    """The same, for every pair."""

    attention_crashes: int = 0
    expert_crashes: int = 0
    hang_share: float = 0.3
    """Failures that close no connection, and so are noticed by probes only."""
    notice_us: int = 100
    """From a closed connection to its notice."""
    probe_us: int = 150_000
    """From a hang to its notice."""
    restart_us: int = 20_000
    """From the notice to the replacement."""


LOADS: dict[str, Load] = {
    "decode": Load(),
    "heavy experts": Load(batch_us=2_500),
    "fast": Load(layer_us=400, layer_pair_us=0.2, between_steps_us=1_000, batch_us=300, batch_pair_us=0.5),
    "two layers": Load(moe_layers=2, steps=100, pause_share=0.2),
    "with prompts": Load(prompt_share=0.05),
    "uneven": Load(paces=(1.0, 5.0)),
    "faults": Load(prompt_share=0.02, attention_crashes=3, expert_crashes=2),
}
"""The loads that ``tarragon simulate`` runs."""
