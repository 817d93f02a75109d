"""Every limit, timeout and size of Tarragon, with its unit in its name.

One struct, three sources that set the same names: a TOML file (``[tarragon]``),
environment variables (``TARRAGON_<NAME>`` in capitals) and command-line flags
(``--name-with-dashes``); the later source wins.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from tarragon.checkpoint.mode import parse as parse_mode

# --- hard bounds of the transport: no setting may exceed them, and a peer that asks for more is refused
REGION_HIDDEN_MAX: Final = 65_536
"""Widest row in a shared region, in elements."""
REGION_PAIRS_MAX: Final = 1 << 22
"""Most (token, expert) rows in a shared region."""
CHECKPOINT_ROWS_SHARE: Final = 0.9
"""Part of a bucket that is rows; the rest is room for its records and checksums."""
BUCKET_BYTES_MAX: Final = 1 << 40
"""Largest checkpoint bucket of one worker."""
HANDSHAKES_PENDING_MAX: Final = 64
"""Connections of one listener that have not yet proved that they know the secret."""
LINK_OFFER_TIMEOUT_S: Final = 10.0
"""Longest wait for the other side's word when a data link is set up."""
GRAMMAR_POLL_MS: Final = 2
"""How often an idle attention worker looks whether the grammar of a moved request is compiled."""
SEND_TIMEOUT_S: Final = 5.0
"""A peer that does not take one frame within this time counts as gone: it is stopped or hangs."""


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or out of its range."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one cluster. Handed to every process when it is forked."""

    # --- shape of the cluster
    attention_workers: int = 2
    expert_workers: int = 2
    attention_threads: int = 0
    """Compute threads per attention worker; 0 shares the host's cores evenly."""
    expert_threads: int = 0
    """Compute threads per expert worker; 0 shares the host's cores evenly."""

    # --- memory
    expert_memory_bytes_max: int = 0
    """Budget of resident expert weights per expert worker; 0 means room for primaries and shadows."""
    shadow_replicas: int = 1
    """Inactive copies wanted for every expert, each on another worker than its primary (5.3)."""
    kv_cache_bytes: int = 1 << 30
    """Paged KV cache of each attention worker."""
    checkpoint_bytes_max: int = 0
    """Budget of the checkpoint store, in bytes reserved for buckets (section 6); 0 means no bound. A bucket
    is about as large as the KV cache of its worker, which is made smaller where the budget asks for it: then
    requests wait for room as they wait for the cache, and what runs is protected."""
    checkpoint_mode: str = "segments"
    """"segments": every new row of every request; "none": no protection; "pause-N": the whole cache every N
    steps, a baseline to compare with."""
    bucket_linger_s: float = 30.0
    """How long the checkpoints of a dead attention worker are kept for those who restore its requests."""

    # --- expert batching (5.2)
    batch_join_wait_us_max: int = 20_000
    """Longest wait of a ready batch for a worker that can still join it. Planned waits are at most half of it
    and mostly far shorter; one for a worker that hangs lasts so long. Keep it below the time of detection."""
    batch_align_layers_max: int = 2
    """A batch waits only for workers at most this many layers behind it."""
    batch_pairs_min: int = 512
    """A batch of this many (token, expert) pairs starts without waiting for more."""
    batch_pairs_max: int = 512
    """Largest kernel call; a bigger prefill is cut so that decodes get in between."""
    batch_decodes_before_prefill_max: int = 8
    """A waiting slice of a prefill lets at most this many decode batches pass."""
    decode_pairs_max: int = 512
    """A frame of more pairs than this counts as prefill: no decode batch waits for it."""

    # --- failure detection (section 5, appendix E)
    probe_silence_ms: float = 30.0
    """A peer that owes an answer and sends nothing for this long is probed; what it sends is a heartbeat."""
    probe_interval_ms: float = 20.0
    """Between probes, and how long an answer to one may take before it counts as missed."""
    probe_misses_max: int = 6
    """So many probes in a row without an answer are fail-stop. A worker that hangs is found after
    probe_silence_ms + probe_misses_max * probe_interval_ms of silence. The patience of all misses together is
    to exceed the slowest answer of a live one: on two busy cores 0.15 ms in the median, up to 50 ms late."""
    expert_batch_ms_max: float = 10_000.0
    """An expert worker that answers probes, owes rows and makes no progress for so long is wedged. One batch
    is its unit of progress: keep this above the time of batch_pairs_max pairs."""
    expert_answer_timeout_s: float = 120.0
    """Last resort: rows that a live expert worker has not answered for so long are taken elsewhere."""
    attention_step_ms_max: float = 10_000.0
    """An attention worker that answers probes, owes tokens and makes no progress for this long is wedged."""
    probe_open_timeout_s: float = 1.0
    """Longest wait for a worker to accept a connection for probes; after that it is dialled again."""
    link_retry_ms: float = 1_000.0
    """An attention worker that lost its link to a live expert worker dials it again after this long."""
    worker_probe_interval_ms: float = 1_000.0
    """How often the orchestrator probes every worker, busy or not."""
    worker_probe_timeout_ms: float = 1_000.0
    """A worker that nobody suspects is dead after this long without an answer to the orchestrator's probes;
    a suspect is as soon as its peers would say so."""

    # --- control plane
    handshake_timeout_s: float = 10.0
    connect_timeout_s: float = 10.0
    worker_ready_timeout_s: float = 600.0
    """A worker that is not ready this long after its fork is given up."""
    attention_unavailable_timeout_s: float = 60.0
    """How long a request waits for an attention worker when none is left, before it fails (503)."""
    utility_timeout_s: float = 30.0
    """How long the gateway waits for a worker's answer to a command such as emptying its prefix cache."""
    expert_unreachable_timeout_s: float = 60.0
    """How long a request waits for an expert that no live worker hosts, before it fails (503)."""
    report_interval_ms: float = 1_000.0
    """How often a worker sends its counters to the orchestrator."""
    shutdown_grace_s: float = 5.0
    """Between SIGTERM and SIGKILL of a worker that is told to stop."""
    max_failovers_per_request: int = 3

    # --- orchestrator: provisioning, restarts, status (5.4)
    workers_per_role_max: int = 64
    """`add` refuses to go beyond this."""
    expert_load_ratio_max: float = 1.25
    """Re-placement moves experts by load where a layer's busiest worker has more than this times the mean."""
    crash_loop_uptime_s: float = 2.0
    """A worker that dies before it was healthy for this long may be in a crash loop."""
    crash_loop_restarts_max: int = 5
    """After so many such deaths in a row the worker is given up, until a person asks for it."""
    restart_backoff_s: float = 0.5
    """Pause before the second restart in a row; it doubles with every further one. The first is immediate."""
    restart_backoff_s_max: float = 30.0
    adoption_window_s: float = 2.0
    """So long a restarted orchestrator waits for the workers of its predecessor to dial again."""
    drain_timeout_s: float = 60.0
    """A worker that is not empty this long after it was asked to drain is stopped all the same."""
    orchestrator_tick_ms: float = 20.0
    """Resolution of the orchestrator's timers."""
    control_queue_max: int = 256
    """Messages that wait for one worker to take them; one that lets more pile up counts as cut off."""
    events_max: int = 1_024
    """Events that /events remembers."""
    history_interval_ms: float = 1_000.0
    """How often /history takes a sample."""
    history_samples_max: int = 900
    """Samples that /history remembers: a quarter of an hour at the default interval."""
    admin_body_bytes_max: int = 16 << 10
    """Largest body of one request to the status API."""
    admin_request_timeout_s: float = 10.0
    """Longest time to read one request to the status API."""

    # --- node agent (5.4)
    start_failures_max: int = 2
    """A worker that ends by itself this often before the cluster was ever ready makes `serve` give up."""
    orchestrator_restarts_max: int = 5
    """Restarts of the orchestrator within orchestrator_restart_window_s before `serve` gives up."""
    orchestrator_restart_window_s: float = 60.0
    orchestrator_silence_s: float = 5.0
    """An orchestrator that sends the node agent no sign of life for this long hangs, and is replaced."""
    replacement_nice: int = 10
    """Niceness (0..19) of a replacement worker until it is ready, so that its start does not slow the streams
    that go on; ignored where it could not be undone (without CAP_SYS_NICE)."""
    worker_overhead_bytes: int = 512 << 20
    """Private memory of one worker besides weights and KV cache, for the check before the start."""
    log_line_bytes_max: int = 8_192
    """Longer lines of a worker's output are cut in pieces."""

    # --- bounds of frames and queues
    control_frame_bytes_max: int = 16 << 20
    engine_frame_bytes_max: int = 64 << 20
    request_queue_max: int = 1_024
    """Requests that the gateway holds while no attention worker is ready."""
    texts_per_request_max: int = 128
    """Largest ``n`` of one request."""
    requests_live_max: int = 4_096
    """Requests in progress at the gateway, each of ``n`` texts counted; more get a 503."""
    http_body_bytes_max: int = 16 << 20
    """Largest body of one HTTP request."""

    # --- the demonstration model
    demo_download_timeout_s: float = 600.0
    demo_build_wait_timeout_s: float = 600.0
    """How long a second process waits for one that is already building the same model."""

    # --- addresses
    host: str = "127.0.0.1"
    port: int = 8000
    admin_host: str = "127.0.0.1"
    admin_port: int = 8001

    def checked(self) -> Config:
        """Return self, or raise ConfigError naming the first setting out of range."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, (int, float)) and value < 0:
                raise ConfigError(f"{name} must not be negative, but is {value}")
        for name in (
            "attention_workers",
            "expert_workers",
            "probe_misses_max",
            "probe_interval_ms",
            "worker_probe_interval_ms",
            "batch_pairs_max",
            "control_queue_max",
            "events_max",
            "history_interval_ms",
            "history_samples_max",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}")
        try:
            parse_mode(self.checkpoint_mode)
        except ValueError as error:
            raise ConfigError(f"checkpoint_mode: {error}") from error
        for name in ("port", "admin_port"):
            if not 1 <= getattr(self, name) <= 65_535:
                raise ConfigError(f"{name} must lie in 1..65535, but is {getattr(self, name)}")
        return self

    @property
    def kv_cache_bytes_granted(self) -> int:
        """KV cache of each attention worker that the checkpoint store has room to mirror.

        A dead worker's bucket is kept while its requests are restored, so there is room for one more.
        """
        if not self.checkpoint_bytes_max or self.checkpoint_mode != "segments":
            return self.kv_cache_bytes
        share = self.checkpoint_bytes_max // (self.attention_workers + 1)
        return min(self.kv_cache_bytes, int(share * CHECKPOINT_ROWS_SHARE))

    def threads(self, role: str, cores: int) -> int:
        """Compute threads of one worker of ``role`` ("attention" or "expert") on a host of ``cores``."""
        if role == "attention":
            return self.attention_threads or max(1, cores // self.attention_workers)
        return self.expert_threads or max(1, cores // self.expert_workers)


def load(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Merge defaults, file, environment and flags (those that are not None), the later winning.

    Raises ConfigError for an unknown name, a wrong type or an unreadable file.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            document = tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration file {file}: {error}") from error
        values.update(document.get("tarragon", {}))
    environ = os.environ if environ is None else environ
    for name in Config.__struct_fields__:
        text = environ.get(f"TARRAGON_{name.upper()}")
        if text is not None:
            values[name] = text
    values.update({name: value for name, value in (flags or {}).items() if value is not None})
    try:
        # strict=False turns the environment's strings into numbers.
        return msgspec.convert(values, Config, strict=False).checked()
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad configuration: {error}") from error
