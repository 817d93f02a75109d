"""Every limit, timeout and size of Tarragon, with its unit in its name.

One struct, three sources that set the same names: a TOML file (``[tarragon]``),
environment variables (``TARRAGON_<NAME>`` in capitals) and command-line flags
(``--name-with-dashes``); the later source wins.

The docstrings of the fields are their only description: `tarragon serve --help`
shows their first sentences, docs/configuration.md the whole of them.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from tarragon.checkpoint.mode import parse as parse_mode

# --- hard bounds of the transport: no setting may exceed them, and a peer that asks for more is refused
REGION_HIDDEN_MAX: Final = 65_536
"""Widest row in a shared region, in elements."""
REGION_PAIRS_MAX: Final = 1 << 22
"""Most (token, expert) rows in a shared region."""
DATA_FRAMES_BUFFERED_MAX: Final = 128
"""Most data frames that are taken from a link at once."""
HANDSHAKES_PENDING_MAX: Final = 64
"""Connections of one listener that have not yet proved that they know the secret."""
PROBE_CHANNELS_MAX: Final = 1_024
"""Most probe channels that one worker answers; further ones are refused."""

# --- waits of the transport
DIAL_PAUSE_S_MIN: Final = 0.001
DIAL_PAUSE_S_MAX: Final = 0.02
"""Who dials one that does not listen yet tries again after the first of these, then up to the second."""
CONTROL_REDIAL_PAUSE_S: Final = 0.02
"""A worker dials an orchestrator that restarts again after this pause."""
LINK_OFFER_TIMEOUT_S: Final = 10.0
"""Longest wait for the other side's word when a data link is set up."""
SEND_TIMEOUT_S: Final = 5.0
"""A peer that does not take one frame within this time counts as gone: it is stopped or hangs."""
EXHAUSTED_PAUSE_S: Final = 0.05
"""How long nobody is accepted once there are no descriptors left."""
PROBES_OFF_S: Final = 86_400.0
"""Silence before the first probe where probing is switched off: a day."""

# --- checkpoints (6.1, 6.2)
CHECKPOINT_ROWS_SHARE: Final = 0.9
"""Part of a bucket that is rows; the rest is room for its records and checksums."""
BUCKET_BYTES_MAX: Final = 1 << 40
"""Largest checkpoint bucket of one worker."""
BUCKETS_MAX: Final = 256
"""Most buckets at a time: the node agent and the store keep a descriptor of each."""
SEGMENTS_PER_WRITE: Final = 16
SEGMENT_ROWS_PER_WRITE: Final = 64
"""New rows of the KV cache are written to the checkpoint with the rows of this many layers, or at once if a
layer has as many as this."""
SEGMENT_POPULATED_BYTES: Final = 64 << 10
"""The memory of a bucket's rows comes into being so much at a time, as a rule before it is needed: page by
page, each is a fault in the way of a step."""
RECORD_READ_ATTEMPTS_MAX: Final = 8
"""A record that changes under a reader this often belongs to a worker that is alive: it is not read."""
RESTORE_THREADS: Final = 2
"""Requests whose rows are read at a time, beside an attention worker's engine."""
RESTORED_POSITIONS_PER_STEP: Final = 1024
"""An engine step takes up no further request once it has so many restored positions to load: streams that run
wait for that."""
ROWS_PATIENCE_S: Final = 0.01
"""How long a step waits for rows of requests from elsewhere that are being read: for their readers, one step
more without them is longer."""
ROWS_WAIT_S: Final = 0.002
"""How long an engine with nothing else to do waits for rows at a time: it has mail to look at."""
STORE_REDIAL_PAUSE_S: Final = 0.05
"""An attention worker dials a store that restarts again after this pause."""
STORE_BIND_PAUSE_S: Final = 0.005
"""A store that finds its predecessor's address taken tries again after this pause."""
STORE_SEND_TIMEOUT_S: Final = 0.5
"""A worker that does not take a message of some bytes within this time is cut off; it may dial again."""
BUCKET_FD_TIMEOUT_S: Final = 5.0
"""A descriptor follows its announcement at once."""
VAULT_GUESTS_MAX: Final = 4
"""Connections at a time: the store's, its predecessor's, and some that are about to be refused."""
VAULT_SEND_TIMEOUT_S: Final = 0.5
"""A store that does not take its buckets back in this time must not hold up the agent."""

# --- attention workers
NO_HOST_WAIT_S: Final = 0.05
"""How long a step whose expert has no live host waits for news at a time."""
GRAMMAR_POLL_MS: Final = 2
"""How often an idle attention worker looks whether the grammar of a moved request is compiled."""

# --- orchestrator and node agent
TICK_COUNTED_S_MAX: Final = 0.5
"""What one tick adds at most to a gateway's silence: a machine that stood still has heard nobody."""
SHADOW_REPLICAS_MAX: Final = 63
"""Most copies of an expert besides the one in use."""
AGENT_DIAL_SLICE_S: Final = 0.1
"""How long the node agent waits at a time for the orchestrator to listen: it has workers to reap."""
AGENT_HANDSHAKE_S: Final = 2.0
"""How long it waits for an orchestrator that listens; one that dies ends the wait."""
AGENT_UNSENT_MAX: Final = 1_024
"""Messages that the node agent keeps for an orchestrator that is away."""
GROUP_NICE_INTERVAL_S: Final = 0.1
GROUP_NICE_ATTEMPTS: Final = 10
"""How often, and how many times, the kernel is asked to change a session's niceness."""

# --- gateway
WORKER_REDIAL_PAUSE_S_MIN: Final = 0.05
WORKER_REDIAL_PAUSE_S_MAX: Final = 2.0
"""The gateway dials a worker that does not answer again after the first of these, then ever more rarely."""
ORCHESTRATOR_REDIAL_PAUSE_S: Final = 0.2
"""The gateway dials an orchestrator that restarts again after this pause."""
OUTPUTS_WAITING_MAX: Final = 256
"""Engine steps that may wait for detokenisation before the workers' sockets are left to fill."""
SERVER_STARTED_POLL_S: Final = 0.005
"""How often a starting gateway looks whether its server accepts connections."""
TRACES_FLUSH_TIMEOUT_S: Final = 2.0
"""How long the gateway's end waits for its last spans to be taken."""

# --- grammars on trial
GRAMMAR_HELPERS_TRIED_MAX: Final = 3
"""Helpers that one grammar may cost before it is refused."""
GRAMMAR_SIGN_INTERVAL_S: Final = 1.0
"""How often the process that tries grammars shows that it lives."""
GRAMMAR_VERDICT_BYTES_MAX: Final = 16 << 10
"""Longest answer of that process."""
GRAMMAR_REASON_BYTES_MAX: Final = 2_000
"""Longest sentence of why a grammar is refused."""

# --- names
LOG_FORMATS: Final = ("text", "json")
API_KEY_VARIABLE: Final = "TARRAGON_API_KEY"
ADMIN_KEY_VARIABLE: Final = "TARRAGON_ADMIN_KEY"
"""Environment variables with keys: no settings, so that no listing of settings shows them."""


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or out of its range."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one cluster. Handed to every process when it is forked."""

    # --- shape of the cluster
    attention_workers: int = 2
    """Attention workers to start; each answers requests with a copy of everything but the experts."""
    expert_workers: int = 2
    """Expert workers to start; the experts are spread over them."""
    attention_threads: int = 0
    """Compute threads per attention worker; 0 shares the host's cores evenly."""
    expert_threads: int = 0
    """Compute threads per expert worker; 0 shares the host's cores evenly."""

    # --- memory
    expert_memory_bytes_max: int = 0
    """Budget of resident expert weights per expert worker, shared or not; 0 means room for primaries and
    shadows."""
    share_expert_memory: bool = True
    """Expert workers of a host read the same packed experts, which are in memory once. Off: every worker
    loads and frees copies of its own, as workers have to whose devices have memory of their own."""
    shadow_replicas: int = 1
    """Inactive copies wanted for every expert, each on another worker than its primary (5.3)."""
    kv_cache_bytes: int = 1 << 30
    """Paged KV cache of each attention worker."""
    checkpoint_bytes_max: int = 0
    """Budget of the checkpoint store, in bytes reserved for buckets (section 6); 0 means no bound. A bucket
    is about as large as the KV cache of its worker, which is made smaller where the budget asks for it: then
    requests wait for room as they wait for the cache, and what runs is protected."""
    checkpoint_mode: str = "segments"
    """"segments": every new row of every request; "none": no protection. To compare with: "pause-N": the
    whole cache every N steps; "alternate": segments in every other step."""
    bucket_linger_s: float = 30.0
    """How long the checkpoints of a dead attention worker are kept for those who restore its requests, from
    when there is one."""
    bucket_linger_min_s: float = 5.0
    """The same if another attention worker waits for that room: requests are restored within a second."""
    store_room_wait_s: float = 10.0
    """How long a new attention worker waits for room for its checkpoints before it takes requests without."""
    store_wait_s: float = 3.0
    """How long a new attention worker waits for the checkpoint store before it takes requests without."""

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
    traffic_events_max: int = 0
    """How many of its latest movements of rows and checkpoint segments an attention worker remembers and
    reports every report_interval_ms (fig. 8); 0 records nothing."""
    count_batch_sizes: bool = False
    """Whether expert workers also count the rows that each expert gets at once, by layer (appendix B)."""

    # --- baselines to compare with
    static_routing: bool = False
    """Whether every expert stays with the worker that had it first, as in systems without a routing table
    (2.2): rows for a worker that is gone wait for its replacement, and no survivor loads its experts."""
    batch_lock_step: bool = False
    """Whether a batch waits, up to batch_join_wait_us_max, for every attention worker that is in a step and
    not beyond the batch's layer (2.2.1), instead of only for those whose coming soon is foreseen."""

    # --- failure detection (section 5, appendix E)
    probe_silence_ms: float = 30.0
    """A peer that owes an answer and sends nothing for this long is probed; what it sends is a heartbeat."""
    pulse_look_ms: float = 60.0
    """How often the gateway looks whether attention workers that owe tokens work, if no token wakes it
    before: one that hangs is found so much later at most. A look by itself costs 0.2 ms of CPU time."""
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

    failpoints: bool = False
    """Whether workers may be told over the admin API to die or hang at a place: for tests only."""

    # --- control plane
    handshake_timeout_s: float = 10.0
    """How long a new connection may take to prove that it knows the cluster's secret."""
    connect_timeout_s: float = 10.0
    """How long a connection to another process of the cluster may take to come about."""
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
    """A request under which more attention workers than this are lost, without a token in between, is given
    up: it may be the cause."""

    # --- orchestrator: provisioning, restarts, status (5.4)
    workers_per_role_max: int = 64
    """`add` refuses to go beyond this."""
    expert_load_ratio_max: float = 1.25
    """Re-placement moves experts by load where a layer's busiest worker has more than this times the mean."""
    shadow_review_s: float = 30.0
    """How often shadows are placed anew by what is used, where memory is too short for all; 0 is never."""
    shadow_gain_min: float = 0.05
    """They move only if what is then covered does at least so much more of all work, as a share of it."""
    gateway_silence_s: float = 30.0
    """A gateway that reports nothing for this long hangs: it is ended, and started again."""
    crash_loop_uptime_s: float = 2.0
    """A worker that dies before it was healthy for this long may be in a crash loop."""
    crash_loop_restarts_max: int = 5
    """After more than so many such deaths in a row the worker is given up, until a person asks for it."""
    restart_backoff_s: float = 0.5
    """Pause before the second restart in a row; it doubles with every further one. The first has none."""
    restart_backoff_s_max: float = 30.0
    """Longest pause before a restart."""
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
    """Largest body of one request to the admin API."""
    admin_request_timeout_s: float = 10.0
    """Longest time to read one request to the admin API."""

    # --- node agent (5.4)
    start_failures_max: int = 2
    """A worker that ends by itself this often before the cluster was ever ready makes `serve` give up."""
    orchestrator_restarts_max: int = 5
    """Restarts of the orchestrator within orchestrator_restart_window_s before `serve` gives up."""
    orchestrator_restart_window_s: float = 60.0
    """The time in which restarts of the orchestrator are counted."""
    orchestrator_start_timeout_s: float = 60.0
    """An orchestrator that does not answer the node agent this long after its start is replaced."""
    orchestrator_silence_s: float = 5.0
    """An orchestrator that sends the node agent no sign of life for this long hangs, and is replaced."""
    replacement_pause_s: float = 0.5
    """A replacement starts this long after a death while others of its role go on, so that its start does not
    fall into the moment in which they take over. Where there is no other, at once."""
    replacement_nice: int = 10
    """Niceness (0..19) of a replacement worker until it is ready, so that its start does not slow the streams
    that go on. Without CAP_SYS_NICE only where the kernel groups processes by session (sched_autogroup)."""
    replacement_idle_s: float = 20.0
    """So long a replacement, until it is ready, gets only cores that nobody else wants (SCHED_IDLE), and who
    serves does not wait for the end of its slice. Then it has its share, so that it starts on a busy machine
    too. Needs CAP_SYS_NICE."""
    worker_overhead_bytes: int = 512 << 20
    """Memory of one worker's own besides weights and KV cache, for the check before the start."""
    log_line_bytes_max: int = 8_192
    """Longer lines of a worker's output are cut in pieces."""
    log_format: str = "text"
    """How lines are written to stderr: "text" for people, "json" for programs. Either has the time (UTC), the
    level, the worker, its epoch and, where a line is about one request, that request's id."""

    # --- traces
    otlp_traces_endpoint: str = ""
    """Where spans are sent (OTLP), such as "http://localhost:4317"; "" means that nothing is traced. gRPC is
    spoken, or HTTP where the environment says OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf."""

    # --- bounds of frames and queues
    control_frame_bytes_max: int = 16 << 20
    """Longest message between the orchestrator and a worker."""
    engine_frame_bytes_max: int = 64 << 20
    """Longest message between the gateway and an attention worker: a prompt, or the tokens of one step."""
    request_queue_max: int = 1_024
    """Requests that the gateway holds while no attention worker is ready."""
    texts_per_request_max: int = 128
    """Largest ``n`` of one request."""
    requests_live_max: int = 4_096
    """Requests in progress at the gateway, each of ``n`` texts counted; more get a 503."""
    http_body_bytes_max: int = 16 << 20
    """Largest body of one HTTP request."""
    http_body_timeout_s: float = 60.0
    """How long the body of one HTTP request may take to arrive; then it gets a 408."""
    prompts_per_request_max: int = 1_024
    """Most prompts or conversations in one request."""
    stop_strings_max: int = 64
    """Most stop strings (and as many bad words) of one request."""
    stop_string_chars_max: int = 1_024
    """Longest stop string or bad word, in characters."""
    token_lists_max: int = 4_096
    """Most entries of a request's lists of token ids and of its logit_bias."""
    grammar_bytes_max: int = 64 << 10
    """Longest schema, regular expression, grammar or list of choices of one request, in bytes of JSON."""
    tools_bytes_max: int = 512 << 10
    """Longest list of tools of one request, in bytes of JSON."""
    grammar_compile_cpu_s_max: int = 10
    """Computing time that a grammar may take to compile. One that takes longer is refused (400)."""
    grammar_compile_timeout_s: float = 60.0
    """How long a request waits until its grammar was tried, on a busy host and behind others, before it
    fails (503)."""
    grammar_helper_silence_s: float = 15.0
    """A process that tries grammars and gives no sign of life for so long is replaced."""
    grammar_memory_bytes_max: int = 2 << 30
    """Memory that a grammar may take to compile. One that takes more is refused (400)."""

    # --- the demonstration model
    demo_download_timeout_s: float = 600.0
    """How long the download of the source model may take."""
    demo_build_wait_timeout_s: float = 600.0
    """How long a second process waits for one that is already building the same model."""

    # --- addresses
    host: str = "127.0.0.1"
    """Where the OpenAI-compatible API listens; any but a loopback address needs an API key."""
    port: int = 8000
    """TCP port of the OpenAI-compatible API."""
    admin_host: str = "127.0.0.1"
    """Where the admin API and the dashboard listen; any but a loopback address needs an admin key."""
    admin_port: int = 8001
    """TCP port of the admin API and the dashboard."""

    # --- keys and certificates
    api_key_file: str = ""
    """File with the keys of the OpenAI-compatible API, one a line. The environment variable TARRAGON_API_KEY
    may hold keys too. Without any, whoever reaches the address may ask."""
    admin_key_file: str = ""
    """File with the keys of the admin API, one a line. The environment variable TARRAGON_ADMIN_KEY may hold
    keys too. Commands such as `tarragon kill` show the first one that they find there."""
    ssl_certfile: str = ""
    """PEM file with the certificate (chain) of the OpenAI-compatible API. With it, the API speaks HTTPS."""
    ssl_keyfile: str = ""
    """PEM file with the certificate's private key, without a password."""
    admin_ssl_certfile: str = ""
    """PEM file with the certificate of the admin API. With it, the admin API speaks HTTPS, and commands such
    as `tarragon status` accept this certificate and no other."""
    admin_ssl_keyfile: str = ""
    """PEM file with the private key of the admin API's certificate, without a password."""

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
            "grammar_compile_cpu_s_max",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(
                f"log_format must be one of {', '.join(LOG_FORMATS)}, but is {self.log_format!r}"
            )
        try:
            parse_mode(self.checkpoint_mode)
        except ValueError as error:
            raise ConfigError(f"checkpoint_mode: {error}") from error
        for name in ("port", "admin_port"):
            if not 1 <= getattr(self, name) <= 65_535:
                raise ConfigError(f"{name} must lie in 1..65535, but is {getattr(self, name)}")
        return self

    @property
    def checkpoints_bounded(self) -> bool:
        """Whether the checkpoint store may run out of room."""
        return bool(self.checkpoint_bytes_max) and self.checkpoint_mode == "segments"

    @property
    def kv_cache_bytes_granted(self) -> int:
        """KV cache of each attention worker that the checkpoint store has room to mirror.

        A dead worker's bucket is kept while its requests are restored, so there is room for one more.
        """
        if not self.checkpoints_bounded:
            return self.kv_cache_bytes
        share = self.checkpoint_bytes_max // (self.attention_workers + 1)
        return min(self.kv_cache_bytes, int(share * CHECKPOINT_ROWS_SHARE))

    def threads(self, role: str, cores: int, workers: int = 0) -> int:
        """Compute threads of one worker of ``role`` ("attention" or "expert") on a host of ``cores``.

        ``workers`` of its role share them; 0 means as many as configured.
        """
        if role == "attention":
            return self.attention_threads or max(1, cores // (workers or self.attention_workers))
        return self.expert_threads or max(1, cores // (workers or self.expert_workers))


class Settings(NamedTuple):
    """A configuration, and where each of its values came from."""

    config: Config
    sources: dict[str, str]
    """By name of the setting: "default", the file, "TARRAGON_<NAME>" or "--name-with-dashes"."""


def load(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Merge defaults, file, environment and flags (those that are not None), the later winning.

    Raises ConfigError for an unknown name, a wrong type, a value out of range or an unreadable file.
    """
    return load_settings(file, environ, flags).config


def load_settings(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """As ``load``, with the source of each value. Raises as ``load`` does."""
    types = {field.name: field.type for field in msgspec.structs.fields(Config)}
    values: dict[str, Any] = {}
    sources = dict.fromkeys(types, "default")

    def take(name: str, value: Any, source: str, where: str) -> None:
        try:
            # strict=False turns the environment's strings into numbers.
            values[name] = msgspec.convert(value, types[name], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"bad configuration: {where}: {error}") from error
        sources[name] = source

    for name, value in ({} if file is None else _read(file)).items():
        if name not in types:
            raise ConfigError(f"{file}: {name} is not a setting{_nearest(name, types)}")
        take(name, value, str(file), f"{name} in {file}")
    for variable, text in _of_environment(os.environ if environ is None else environ, types).items():
        take(variable.removeprefix(_PREFIX).lower(), text, variable, variable)
    for name, value in (flags or {}).items():
        flag = flag_of(name)
        if name not in types:
            raise ConfigError(f"{flag} is not a setting{_nearest(flag, map(flag_of, types))}")
        if value is not None:
            take(name, value, flag, flag)
    return Settings(Config(**values).checked(), sources)


def flag_of(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


_PREFIX: Final = "TARRAGON_"
_TYPO_RATIO: Final = 0.85
"""So alike to a setting's is the name of a variable that is taken for a misspelt one. Others may exist: some
hosts set variables for every service by its name."""


def _read(file: Path) -> dict[str, Any]:
    """The table named tarragon of a TOML file; raises ConfigError."""
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error}") from error
    for name in document:
        if name != "tarragon":
            raise ConfigError(f"{file}: settings belong in a table named tarragon, but there is {name!r}")
    table = document.get("tarragon", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: tarragon must be a table, [tarragon]")
    return table


def _of_environment(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The variables that set something; raises ConfigError for one that seems to be misspelt."""
    known = [name.upper() for name in names]
    for variable in environ:
        name = variable.removeprefix(_PREFIX)
        if not variable.startswith(_PREFIX) or variable in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE):
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=_TYPO_RATIO)
            if close:
                raise ConfigError(f"{variable} is not a setting; the nearest is {_PREFIX}{close[0]}")
    return {_PREFIX + name: environ[_PREFIX + name] for name in known if _PREFIX + name in environ}


def _nearest(name: str, known: Iterable[str]) -> str:
    by_words = {_words(known_name): known_name for known_name in known}
    close = difflib.get_close_matches(_words(name), by_words, n=1)
    return f"; the nearest is {by_words[close[0]]}" if close else ""


def _words(name: str) -> str:
    """A name without the marks that differ between a flag and a key of a file."""
    return name.lstrip("-").replace("-", "_").lower()
