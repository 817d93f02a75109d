"""Messages between the gateway and an attention worker, over vLLM's own request and output types.

The gateway dials the worker and sends ``Attach``; the worker answers ``Facts``. Then the gateway sends
``Add``, ``Hold``, ``Abort`` and ``Utility``, the worker ``Outputs``, ``Stats`` and ``UtilityResult``. Every
assignment of a request carries an attempt number, which its outputs and aborts repeat (one owner per
request).

One message is one frame of the transport::

    kind u8 | WIRE_VERSION u8 | buffers u16 | reserved u32 | length of each buffer, u32 | padding
    | buffers, each padded to 16 bytes

Buffer 0 is msgpack; the others are raw tensors that it refers to by index. Nothing on this link is ever
unpickled, whatever the environment says: of msgpack's extension types only raw bytes are known here.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import torch
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import CUSTOM_TYPE_RAW_VIEW, MsgpackDecoder, MsgpackEncoder

from tarragon.messages import ProtocolError

WIRE_VERSION: Final = 1
BUFFERS_MAX: Final = 65_535
ALIGNMENT_BYTES: Final = 16
UTILITIES: Final = frozenset({"reset_prefix_cache"})
"""Names that a Utility may carry: each is safe while requests run."""

_HEADER: Final = struct.Struct("<BBHI")
_UNSIGNED = Annotated[int, msgspec.Meta(ge=0)]
Buffer = bytes | bytearray | memoryview


class Kind(enum.IntEnum):
    ATTACH = 1
    FACTS = 2
    ADD = 3
    ABORT = 4
    OUTPUTS = 5
    STATS = 6
    UTILITY = 7
    UTILITY_RESULT = 8
    HOLD = 9


class Attach(msgspec.Struct, frozen=True):
    """Gateway -> worker, first frame: who I am and which incarnation of you I mean.

    The worker closes the link if ``worker_epoch`` is not its own; a link with a higher ``gateway_epoch``
    replaces an older one, whose requests it aborts.
    """

    gateway_epoch: _UNSIGNED
    worker_epoch: _UNSIGNED


class Facts(msgspec.Struct, frozen=True):
    """Worker -> gateway, first frame: the engine is up, and this is what came of its configuration."""

    worker_id: str
    epoch: _UNSIGNED
    max_model_len: _UNSIGNED
    """Tokens of the longest sequence."""
    num_gpu_blocks: _UNSIGNED
    """Blocks of the paged KV cache, of ``block_size`` tokens each."""
    block_size: _UNSIGNED
    max_num_seqs: _UNSIGNED = 0
    max_num_batched_tokens: _UNSIGNED = 0
    kv_cache_size_tokens: int | None = None
    kv_cache_max_concurrency: float | None = None


class Origin(msgspec.Struct, frozen=True):
    """An earlier attempt at a request, whose committed state its worker's bucket may hold."""

    worker_id: str
    epoch: _UNSIGNED
    attempt: _UNSIGNED
    living: bool = False
    """The worker lives and holds the attempt: it is not to be fenced."""


class Add(msgspec.Struct, frozen=True):
    """Gateway -> worker: run this request; every output of it repeats ``attempt``.

    A request that was lost elsewhere goes on behind the tokens that were ``sent``: they count as its
    output. ``origins``, newest first, say where its rows may be restored from; without any that is
    usable, the worker computes them again.
    """

    attempt: _UNSIGNED
    request: EngineCoreRequest
    sent: list[_UNSIGNED] = []
    origins: list[Origin] = []


class Abort(msgspec.Struct, frozen=True):
    """Gateway -> worker: forget these attempts, by request id; unknown ones are no error."""

    attempts: dict[str, _UNSIGNED]


class Hold(msgspec.Struct, frozen=True):
    """Gateway -> worker: compute these attempts no further, but keep their rows until they are aborted."""

    attempts: dict[str, _UNSIGNED]


class Resumed(msgspec.Struct, frozen=True, array_like=True):
    """How a request that came from elsewhere went on: positions of it that needed no computing."""

    restored: _UNSIGNED = 0
    """Taken from an earlier attempt's checkpoint."""
    cached: _UNSIGNED = 0
    """Found in the worker's own prefix cache."""


class Outputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """Worker -> gateway: the outcome of one engine step; ``attempts`` has every request id of it.

    ``resumed`` has those whose first output since they came from elsewhere is in it.
    """

    attempts: dict[str, _UNSIGNED]
    outputs: EngineCoreOutputs
    resumed: dict[str, Resumed] = {}


class Stats(msgspec.Struct, frozen=True):
    """Worker -> gateway: the scheduler's state when no step reports it (an idle worker)."""

    scheduler_stats: SchedulerStats


class Utility(msgspec.Struct, frozen=True):
    """Gateway -> worker: call the engine method ``name``, one of UTILITIES, with plain arguments."""

    call_id: _UNSIGNED
    name: str
    args: list[bool | int | float | str | None] = []


class UtilityResult(msgspec.Struct, frozen=True):
    """Worker -> gateway: the plain result of a Utility, or why it failed (then ``failure`` is not empty)."""

    call_id: _UNSIGNED
    result: bool | int | float | str | None = None
    failure: str = ""


Message = Attach | Facts | Add | Hold | Abort | Outputs | Stats | Utility | UtilityResult

_TYPES: Final[dict[Kind, type[Message]]] = {
    Kind.ATTACH: Attach,
    Kind.FACTS: Facts,
    Kind.ADD: Add,
    Kind.HOLD: Hold,
    Kind.ABORT: Abort,
    Kind.OUTPUTS: Outputs,
    Kind.STATS: Stats,
    Kind.UTILITY: Utility,
    Kind.UTILITY_RESULT: UtilityResult,
}
_KINDS: Final[dict[type[Any], Kind]] = {type_: kind for kind, type_ in _TYPES.items()}

FROM_GATEWAY: Final = frozenset({Kind.ATTACH, Kind.ADD, Kind.HOLD, Kind.ABORT, Kind.UTILITY})
FROM_WORKER: Final = frozenset({Kind.FACTS, Kind.OUTPUTS, Kind.STATS, Kind.UTILITY_RESULT})


class _Encoder(MsgpackEncoder):  # type: ignore[misc]
    """vLLM's encoder without its fallbacks: tensors and numeric arrays, or TypeError."""

    def enc_hook(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            return self._encode_tensor(obj)
        if isinstance(obj, np.ndarray) and obj.dtype.kind not in "OV":
            return self._encode_ndarray(obj)
        raise TypeError(f"{type(obj).__name__} does not travel between gateway and workers")


class _Decoder(MsgpackDecoder):  # type: ignore[misc]
    """vLLM's decoder without its fallbacks: no extension but raw bytes, no types named by the sender."""

    def ext_hook(self, code: int, data: memoryview) -> Any:
        if code == CUSTOM_TYPE_RAW_VIEW:
            return data
        raise ProtocolError(f"extension type {code} is refused")

    def dec_hook(self, t: type, obj: Any) -> Any:
        if isinstance(t, type) and issubclass(t, np.ndarray):
            return self._decode_ndarray(obj)
        if isinstance(t, type) and issubclass(t, torch.Tensor):
            return self._decode_tensor(obj)
        raise ProtocolError(f"{getattr(t, '__name__', t)} does not travel between gateway and workers")


class Codec:
    """Encodes any message and decodes those that the other side may send. One per thread.

    ``receives`` is FROM_WORKER at the gateway and FROM_GATEWAY at the worker.
    """

    def __init__(self, receives: frozenset[Kind]) -> None:
        self._encoder = _Encoder()
        self._decoders = {kind: _Decoder(_TYPES[kind]) for kind in receives}

    def encode(self, message: Message) -> list[Buffer]:
        """Return the parts of one frame, in order. Raises TypeError for what may not travel.

        Parts of tensors are views, not copies: send them before the tensors change.
        """
        buffers = [memoryview(part).cast("B") for part in self._encoder.encode(message)]
        assert len(buffers) <= BUFFERS_MAX
        lengths = [part.nbytes for part in buffers]
        header = _HEADER.pack(_KINDS[type(message)], WIRE_VERSION, len(buffers), 0)
        header += struct.pack(f"<{len(lengths)}I", *lengths)
        parts: list[Buffer] = [header + bytes(_padding(len(header)))]
        for part, length in zip(buffers, lengths, strict=True):
            parts.append(part)
            if _padding(length):
                parts.append(bytes(_padding(length)))
        return parts

    def decode(self, frame: bytes | bytearray | memoryview) -> Message:
        """Return the message in ``frame``; raise ProtocolError for anything that is not exactly one."""
        kind, buffers = _split(frame)
        decoder = self._decoders.get(kind)
        if decoder is None:
            raise ProtocolError(f"a message of kind {kind.name} does not belong on this side of the link")
        try:
            message: Message = decoder.decode(buffers)
        except ProtocolError:
            raise
        except Exception as error:  # whatever a decoder stumbles over, the sender broke the protocol
            raise ProtocolError(f"malformed {kind.name}: {error}") from error
        _check(message)
        return message


def _padding(length: int) -> int:
    """Bytes that bring ``length`` to the next multiple of ALIGNMENT_BYTES."""
    return -length % ALIGNMENT_BYTES


def _split(frame: bytes | bytearray | memoryview) -> tuple[Kind, Sequence[memoryview]]:
    """Return the kind and the buffers of a frame, or raise ProtocolError; lengths must fit exactly."""
    if len(frame) < _HEADER.size:
        raise ProtocolError(f"engine frame of {len(frame)} bytes")
    kind, version, count, reserved = _HEADER.unpack_from(frame)
    if version != WIRE_VERSION or reserved or kind not in Kind.__members__.values():
        raise ProtocolError(f"engine frame of kind {kind}, version {version}")
    at = _HEADER.size + 4 * count
    if count == 0 or len(frame) < at:
        raise ProtocolError(f"engine frame of {len(frame)} bytes for {count} buffers")
    lengths = struct.unpack_from(f"<{count}I", frame, _HEADER.size)
    at += _padding(at)
    if len(frame) != at + sum(length + _padding(length) for length in lengths):
        raise ProtocolError(f"engine frame of {len(frame)} bytes does not match its lengths")
    # A writable copy: tensors made from read-only memory are undefined once somebody writes to them.
    whole = memoryview(bytearray(frame))
    buffers = []
    for length in lengths:
        buffers.append(whole[at : at + length])
        at += length + _padding(length)
    return Kind(kind), buffers


def _check(message: Message) -> None:
    """Raise ProtocolError if a message of the right shape says what it must not."""
    if isinstance(message, Add):
        request = message.request
        if request.sampling_params is None or not request.prompt_token_ids:
            raise ProtocolError("a request needs sampling parameters and prompt tokens")
        for name in ("mm_features", "pooling_params", "lora_request", "prompt_embeds"):
            if getattr(request, name) is not None:
                raise ProtocolError(f"a request must not have {name}")
    elif isinstance(message, Outputs):
        if message.outputs.utility_output is not None:
            raise ProtocolError("a utility result must not hide in outputs")
        for output in message.outputs.outputs:
            if output.request_id not in message.attempts:
                raise ProtocolError(f"an output of {output.request_id!r} lacks its attempt")
    elif isinstance(message, Utility) and message.name not in UTILITIES:
        raise ProtocolError(f"utility {message.name!r} is not allowed")
