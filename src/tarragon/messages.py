"""Every message on every link: the whole protocol in one file.

Two kinds of link (section 4.1 keeps them apart):

* **control**: length-prefixed msgpack of the structs below (``Control``),
* **data**: fixed 40-byte frames (``DataFrame``) that announce rows which lie in
  shared memory; nothing is parsed or allocated on their behalf.

Every message carries or is preceded by the sender's epoch; the receiver
refuses and counts what is not of an incarnation that it knows as living.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, Literal, NamedTuple

import msgspec

PROTOCOL_VERSION: Final = 1

Role = Literal["attention", "expert", "store", "orchestrator", "gateway"]
WorkerState = Literal["starting", "healthy", "suspect", "dead", "draining"]


class ProtocolError(ValueError):
    """A frame or message that breaks the protocol: it is refused, never guessed at.

    docs/metrics.md ("What is refused") says who counts it under which name.
    """


# ------------------------------------------------------------------ data frames (AW <-> EW)


class DataKind(enum.IntEnum):
    STEP_BEGIN = 1  # AW -> EW: I am in a step; layer is the next one I will send
    ROWS = 2  # AW -> EW: `pairs` rows lie in the request region (0 is a frame all the same)
    RESULT = 3  # EW -> AW: the rows of `layer` lie in the result region
    STEP_END = 4  # AW -> EW: idle, wait for me no longer
    REFUSED = 5  # EW -> AW: the frame was not accepted; flags says why
    DRAINING = 6  # EW -> AW: send me no more rows once your table allows it


class DataFlag(enum.IntFlag):
    NONE = 0
    PREFILL = 1  # this step computes prompts: no decode batch waits for it
    PRIORITY = 2  # replayed after a failure: run it first (5.1)
    CONTINUES = 4  # another step of this worker follows: it stays "in a step"


class RefusalReason(enum.IntEnum):
    STALE_EPOCH = 1
    BAD_LAYER = 2
    BAD_COUNT = 3
    NOT_RESIDENT = 4


class DataFrame(NamedTuple):
    """One doorbell.

    ``pairs`` counts the (token, expert) rows of this frame, which lie in the region from row ``first`` on
    (a replay is appended behind the rows that were sent before it); ``step`` counts the AW's forward passes.
    """

    kind: int
    layer: int
    sender_epoch: int
    receiver_epoch: int
    pairs: int
    step: int
    flags: int = 0
    first: int = 0


DATA_MAGIC: Final = 0x4E524754  # "TGRN"
_DATA_STRUCT: Final = struct.Struct("<IBBHIIIIQII")
DATA_FRAME_BYTES: Final = _DATA_STRUCT.size


def pack_data(frame: DataFrame) -> bytes:
    """Encode one data frame into DATA_FRAME_BYTES bytes."""
    return _DATA_STRUCT.pack(
        DATA_MAGIC,
        PROTOCOL_VERSION,
        frame.kind,
        frame.layer,
        frame.sender_epoch,
        frame.receiver_epoch,
        frame.pairs,
        frame.flags,
        frame.step,
        frame.first,
        0,
    )


def unpack_data(raw: bytes | bytearray | memoryview) -> DataFrame:
    """Decode one data frame; raise ProtocolError on a wrong length, magic, version or kind."""
    if len(raw) != DATA_FRAME_BYTES:
        raise ProtocolError(f"data frame of {len(raw)} bytes, expected {DATA_FRAME_BYTES}")
    magic, version, kind, layer, sender, receiver, pairs, flags, step, first, _ = _DATA_STRUCT.unpack(raw)
    if magic != DATA_MAGIC or version != PROTOCOL_VERSION:
        raise ProtocolError(f"data frame with magic {magic:#x}, version {version}")
    if not DataKind.STEP_BEGIN <= kind <= DataKind.DRAINING:
        raise ProtocolError(f"data frame of unknown kind {kind}")
    return DataFrame(kind, layer, sender, receiver, pairs, step, flags, first)


# ------------------------------------------------------------------ control messages


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all control messages; the struct's name is its tag."""


class ExpertId(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A logical expert: the one that the gate of ``layer`` (counted among MoE layers, from 0) selects."""

    layer: int
    expert: int


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One live incarnation of a worker and where to reach it."""

    worker_id: str
    role: Role
    epoch: int
    address: str
    pid: int = 0


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The expert routing table (4.2): candidates[layer][expert] indexes ``workers``, best first."""

    version: int
    workers: list[Peer]
    candidates: list[list[list[int]]]


# worker -> orchestrator
class Hello(Message, frozen=True):
    worker_id: str
    role: Role
    epoch: int
    pid: int
    address: str
    resident: list[ExpertId] = []
    """What an expert worker holds already: it dials a second time, because the orchestrator was restarted."""
    was_ready: bool = False
    """It dials a second time and serves: a former orchestrator has named it to its peers."""


class Ready(Message, frozen=True):
    """Weights are in and the links to all live peers stand (5.4)."""

    worker_id: str
    epoch: int
    fingerprint: str
    exact: bool
    inexact_reason: str = ""
    resident: list[ExpertId] = []
    resident_bytes: int = 0
    order: int = 0
    """Expert workers: number of the last Welcome or Assign that is carried out; 0 says nothing about it."""


class TableAck(Message, frozen=True):
    worker_id: str
    epoch: int
    version: int


class Suspicion(Message, frozen=True):
    """A worker's local view about a peer; membership stays the orchestrator's decision."""

    reporter_id: str
    suspect_id: str
    suspect_epoch: int
    cause: str
    withdrawn: bool = False
    """The two are connected again."""


class Report(Message, frozen=True):
    """Counters of one worker, cumulative since it started; names end in their unit."""

    worker_id: str
    epoch: int
    counters: dict[str, float]
    expert_pairs: list[list[int]] = []
    """Expert workers: pairs computed per [layer][expert]."""
    traffic: list[list[float]] = []
    """Attention workers that record it: the latest movements, each as refe/traffic.py has it."""


# whoever watches -> attention or expert worker: the first frame of a connection of its own (4.1, appendix E)
class ProbeOpen(Message, frozen=True):
    """This connection carries nothing but the fixed-size frames of transport/probe.py from now on."""

    sender_id: str
    sender_epoch: int
    receiver_epoch: int


class ProbeAccepted(Message, frozen=True):
    """Probes are answered from now on."""

    epoch: int


# orchestrator -> worker
class Welcome(Message, frozen=True):
    """Answer to Hello: where the experts are, and for an expert worker which ones it shall load."""

    table: Table
    assigned: list[ExpertId] = []
    order: int = 0
    """Number of the assignment, counted from 1 for each incarnation; Ready names it."""
    peers: list[Peer] = []


class TableUpdate(Message, frozen=True):
    table: Table


class Peers(Message, frozen=True):
    """All live workers, for the gateway (attention workers) and for expert workers (who may connect, and
    who shares the host's cores with them)."""

    peers: list[Peer]


class Assign(Message, frozen=True):
    """For an expert worker: the experts it shall hold from now on, primaries first."""

    experts: list[ExpertId]
    order: int = 0


class Drain(Message, frozen=True):
    worker_id: str


class Checkpointing(Message, frozen=True):
    """For attention workers: how they checkpoint from now on; see ``checkpoint.mode``."""

    mode: str
    reprotect: bool = True
    """Compute anew what ran without checkpoints before, so that it has one."""


class Probing(Message, frozen=True):
    """For attention workers and the gateway: whether silent peers are probed from now on (section 5)."""

    enabled: bool


FailpointEffect = Literal["die", "hang"]


class Failpoint(Message, frozen=True):
    """For attention and expert workers: die by SIGKILL, or hang, at the named place; see ``failpoints``."""

    name: str
    after: int = 1
    """The how manieth time that the place is reached from now on."""
    effect: FailpointEffect = "die"


class Stop(Message, frozen=True):
    reason: str = ""


class Refused(Message, frozen=True):
    """The receiver does not accept the sender (stale epoch, unknown id); the link is closed after it."""

    reason: str


# orchestrator <-> node agent
class StartWorker(Message, frozen=True):
    worker_id: str
    role: Role
    epoch: int


class SignalWorker(Message, frozen=True):
    worker_id: str
    epoch: int
    signal: int


class Alive(Message, frozen=True):
    """The orchestrator's sign of life; the node agent replaces one that stops giving it."""


class WorkerStarted(Message, frozen=True):
    worker_id: str
    epoch: int
    pid: int


class WorkerExited(Message, frozen=True):
    worker_id: str
    epoch: int
    pid: int
    status: str
    """Human words, such as "killed by SIGKILL" or "exit code 2"."""
    detail: str = ""
    """Last error line of the worker, if it left one."""


Control = (
    Hello
    | Ready
    | TableAck
    | Suspicion
    | Report
    | ProbeOpen
    | ProbeAccepted
    | Welcome
    | TableUpdate
    | Peers
    | Assign
    | Drain
    | Checkpointing
    | Probing
    | Failpoint
    | Stop
    | Refused
    | StartWorker
    | SignalWorker
    | Alive
    | WorkerStarted
    | WorkerExited
)

DECODE_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises at foreign bytes: malformed, no text, nested without end."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)


def encode_control(message: Control) -> bytes:
    return _encoder.encode(message)


def decode_control(raw: bytes | memoryview) -> Control:
    """Decode one control message; raise ProtocolError if it is not one."""
    try:
        return _decoder.decode(raw)
    except DECODE_ERRORS as error:
        raise ProtocolError(f"malformed control message: {error}") from error
