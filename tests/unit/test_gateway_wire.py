"""What the link between gateway and attention worker carries, and what it refuses."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from tarragon.gateway import wire
from tarragon.gateway.wire import Kind
from tarragon.messages import ProtocolError

GATEWAY = wire.Codec(wire.FROM_WORKER)
WORKER = wire.Codec(wire.FROM_GATEWAY)


def request(**changes: Any) -> EngineCoreRequest:
    constraint = StructuredOutputsParams(regex="a+")
    constraint._backend = "xgrammar"
    params = SamplingParams(
        temperature=0.5, seed=7, stop=["x"], logit_bias={3: 1.0}, structured_outputs=constraint
    )
    fields: dict[str, Any] = {
        "request_id": "cmpl-1",
        "prompt_token_ids": [1, 2, 3],
        "mm_features": None,
        "sampling_params": params,
        "pooling_params": None,
        "arrival_time": 1.5,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(fields | changes))


def frame(message: wire.Message) -> bytes:
    return b"".join(WORKER.encode(message))


def raw(kind: int, *buffers: bytes, version: int = wire.WIRE_VERSION) -> bytes:
    """A frame built by hand from its layout."""
    head = struct.pack("<BBHI", kind, version, len(buffers), 0)
    head += struct.pack(f"<{len(buffers)}I", *map(len, buffers))
    return b"".join(part + bytes(-len(part) % 16) for part in (head, *buffers))


def test_request_arrives_unchanged() -> None:
    sent = wire.Add(3, request())
    got = WORKER.decode(frame(sent))
    assert got == sent
    assert got.request.sampling_params.structured_outputs._backend == "xgrammar"


def test_outputs_arrive_with_logprobs_of_every_size() -> None:
    rows = 200  # large enough to leave the msgpack body for buffers of their own
    small = LogprobsLists(np.array([[5, 6]]), np.array([[-0.5, -1.5]], np.float32), np.array([1]))
    large = LogprobsTensors(
        torch.arange(rows * 21, dtype=torch.int32).view(rows, 21),
        torch.linspace(-9, 0, rows * 21).view(rows, 21),
        torch.arange(rows),
    )
    output = EngineCoreOutput(
        "cmpl-1", [5], new_logprobs=small, new_prompt_logprobs_tensors=large, finish_reason=FinishReason.STOP
    )
    outputs = EngineCoreOutputs(outputs=[output], scheduler_stats=SchedulerStats(num_running_reqs=4))
    parts = WORKER.encode(wire.Outputs({"cmpl-1": 2}, outputs))
    got = GATEWAY.decode(b"".join(parts))
    assert isinstance(got, wire.Outputs)
    (back,) = got.outputs.outputs
    assert got.attempts == {"cmpl-1": 2}
    assert got.outputs.timestamp == outputs.timestamp
    assert got.outputs.scheduler_stats.num_running_reqs == 4
    assert back.finish_reason is FinishReason.STOP
    assert back.new_logprobs.logprobs.dtype == np.float32
    assert np.array_equal(back.new_logprobs.logprobs, small.logprobs)
    for mine, theirs in zip(large, back.new_prompt_logprobs_tensors, strict=True):
        assert mine is theirs or torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "message",
    [
        wire.Attach(1 << 20 | 3, 7),
        wire.Hold({"a": 1}),
        wire.Abort({"a": 1, "b": 0}),
        wire.Utility(9, "reset_prefix_cache", [False, True]),
    ],
)
def test_gateway_messages_arrive_unchanged(message: wire.Message) -> None:
    assert WORKER.decode(frame(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        wire.Facts("aw-0", 5, 4096, 100, 16, kv_cache_size_tokens=1600),
        wire.Stats(SchedulerStats(num_waiting_reqs=2, kv_cache_usage=0.25)),
        wire.UtilityResult(9, True),
        wire.UtilityResult(9, None, "busy"),
    ],
)
def test_worker_messages_arrive_unchanged(message: wire.Message) -> None:
    assert GATEWAY.decode(frame(message)) == message


def test_each_side_refuses_its_own_messages() -> None:
    with pytest.raises(ProtocolError, match="ADD does not belong"):
        GATEWAY.decode(frame(wire.Add(0, request())))
    with pytest.raises(ProtocolError, match="STATS does not belong"):
        WORKER.decode(frame(wire.Stats(SchedulerStats())))


def test_every_truncation_is_a_protocol_error() -> None:
    whole = frame(wire.Add(0, request()))
    for length in range(len(whole)):
        with pytest.raises(ProtocolError):
            WORKER.decode(whole[:length])
    with pytest.raises(ProtocolError):
        WORKER.decode(whole + bytes(16))


def test_flipped_bytes_never_raise_anything_else() -> None:
    whole = frame(wire.Add(0, request()))
    for at in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= flip
            try:
                WORKER.decode(damaged)
            except ProtocolError:
                continue


@pytest.mark.parametrize("code", [1, 2, 4, 77])
@pytest.mark.parametrize("insecure", ["0", "1"])
def test_pickles_are_refused_whatever_the_environment_says(
    code: int, insecure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", insecure)
    bomb = msgspec.msgpack.Ext(code, pickle.dumps(print))
    body = msgspec.msgpack.encode(
        [0, ["r", [1], None, {"extra_args": {"x": bomb}}, None, 1.0, None, None, None]]
    )
    add = msgspec.msgpack.encode({"attempt": 0, "request": msgspec.msgpack.decode(body)[1]})
    codec = wire.Codec(wire.FROM_GATEWAY)
    with pytest.raises(ProtocolError, match="extension type"):
        codec.decode(raw(Kind.ADD, add))
    with pytest.raises(TypeError, match="does not travel"):
        codec.encode(wire.Add(0, request(trace_headers={"x": print})))


def test_sender_cannot_name_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    utility = [1, None, [["subprocess", "Popen"], ["true"]]]
    body = {"attempts": {}, "outputs": [0, [], None, 1.0, utility]}
    with pytest.raises(ProtocolError, match="UtilityResult does not travel"):
        GATEWAY.decode(raw(Kind.OUTPUTS, msgspec.msgpack.encode(body)))
    hidden = EngineCoreOutputs(utility_output=UtilityOutput(1))
    with pytest.raises(ProtocolError, match="hide in outputs"):
        GATEWAY.decode(frame(wire.Outputs({}, hidden)))


@pytest.mark.parametrize(
    "array",
    [
        ["|O", [1], 1],  # object pointers
        ["<f4", [3], 1],  # shape larger than the buffer
        ["<f4", [1], 9],  # a buffer that does not exist
        ["nonsense", [1], 1],
    ],
)
def test_malformed_arrays_are_refused(array: list[Any]) -> None:
    good = ["<i8", [1], 1]
    output = ["cmpl-1", [5], [good, array, good]]
    body = msgspec.msgpack.encode({"attempts": {"cmpl-1": 0}, "outputs": [0, [output], None, 1.0]})
    with pytest.raises(ProtocolError, match="malformed OUTPUTS"):
        GATEWAY.decode(raw(Kind.OUTPUTS, body, bytes(8)))


def test_malformed_tensor_is_refused() -> None:
    bad = ["load", [1], 1]  # an attribute of torch that is not a dtype
    output = ["cmpl-1", [5], None, [bad, bad, bad]]
    body = msgspec.msgpack.encode({"attempts": {"cmpl-1": 0}, "outputs": [0, [output], None, 1.0]})
    with pytest.raises(ProtocolError, match="malformed OUTPUTS"):
        GATEWAY.decode(raw(Kind.OUTPUTS, body, bytes(8)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampling_params": None}, "sampling parameters"),
        ({"prompt_token_ids": []}, "prompt tokens"),
        ({"lora_request": LoRARequest("a", 1, "/a")}, "lora_request"),
        ({"prompt_embeds": torch.zeros(1, 4)}, "prompt_embeds"),
    ],
)
def test_requests_that_no_worker_runs_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        WORKER.decode(frame(wire.Add(0, request(**changes))))


def test_output_without_attempt_is_refused() -> None:
    outputs = EngineCoreOutputs(outputs=[EngineCoreOutput("cmpl-1", [5])])
    with pytest.raises(ProtocolError, match="lacks its attempt"):
        GATEWAY.decode(frame(wire.Outputs({"cmpl-2": 1}, outputs)))


@pytest.mark.parametrize(
    "broken",
    [
        raw(99, b"\xc0"),
        raw(Kind.ABORT, b"\xc0", version=2),
        raw(Kind.ABORT),
        raw(Kind.ABORT, b"\xc0"),
        raw(Kind.ABORT, msgspec.msgpack.encode({"attempts": {"a": -1}})),
        raw(Kind.UTILITY, msgspec.msgpack.encode({"call_id": 1, "name": "collective_rpc"})),
        raw(Kind.UTILITY, msgspec.msgpack.encode({"call_id": 1, "name": "reset_prefix_cache", "args": [[]]})),
    ],
)
def test_malformed_frames_are_refused(broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        WORKER.decode(broken)
