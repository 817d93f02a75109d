"""What vLLM's front end makes of a text whose worker was lost: the same as of one that never moved."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import IterationStats, PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from tarragon.gateway.streams import Send, Streams
from tarragon.gateway.wire import Add

PROMPT = [5, 6, 7, 8]
TEXT = [10, 11, 12, 13, 14, 15]


class Tokenizer:
    """Ids are letters; slow, so that vLLM's own incremental detokenisation in Python is used."""

    is_fast = False
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 26

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool = False) -> list[str]:
        return [chr(97 + number) for number in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(97 + number) for number in ([ids] if isinstance(ids, int) else ids))


def prompt_logprobs() -> LogprobsTensors:
    ids = torch.tensor([[number, 1] for number in PROMPT[1:]])
    return LogprobsTensors(ids, -ids.float(), torch.ones(len(PROMPT) - 1, dtype=torch.int64))


def sample_logprobs(number: int) -> LogprobsLists:
    import numpy as np

    return LogprobsLists(
        np.array([[number, 2]]), np.array([[-0.5 * number, -9.0]], dtype=np.float32), np.array([1])
    )


class Worker:
    """Computes ``TEXT`` from wherever it is told to go on, with all that a real engine would send along."""

    def __init__(self, add: Add, *, restored: int) -> None:
        self.attempt = add.attempt
        self.position = len(add.sent)
        self.with_prompt = add.request.sampling_params.prompt_logprobs is not None
        self.restored = restored if add.origins else 0
        self.fresh = True

    def next(self, at_s: float) -> EngineCoreOutput:
        number = TEXT[self.position]
        self.position += 1
        output = EngineCoreOutput("r", [number], new_logprobs=sample_logprobs(number))
        if self.position == len(TEXT):
            output.finish_reason = FinishReason.LENGTH
        if self.fresh:
            self.fresh = False
            output.prefill_stats = PrefillStats()
            output.prefill_stats.set(len(PROMPT), 0, self.restored)
            kinds = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
            output.events = [EngineCoreEvent.new_event(kind, at_s - 0.1) for kind in kinds]
            if self.with_prompt:
                output.new_prompt_logprobs_tensors = prompt_logprobs()
        return output


def life(*lost_after: int, kind: RequestOutputKind, stop: list[str] | None = None) -> tuple[list[Any], Any]:
    """Run one request whose workers are lost after so many tokens each; return outputs and statistics."""

    async def run() -> tuple[list[Any], Any]:
        params = SamplingParams(
            logprobs=1, prompt_logprobs=1, max_tokens=len(TEXT), output_kind=kind, stop=stop, seed=1
        )
        request = EngineCoreRequest("r", PROMPT, None, params, None, 0.0, None, None, None)
        request.external_req_id = "r"
        processor = OutputProcessor(Tokenizer(), log_stats=True)  # type: ignore[arg-type]
        queue = RequestOutputCollector(kind, "r")
        processor.add_request(request, "fghi", queue=queue)
        streams = Streams(failovers_max=9, waiting_max=9, wait_s=9.0, draw_seed=lambda: 1)
        for name in ("aw-0", "aw-1"):
            streams.worker_up(name, 1, 0.0)
        statistics = IterationStats()
        received: list[Any] = []
        actions = streams.add(request, 0.0)
        left, now_s = list(lost_after), 100.0
        while "r" in streams.live:
            (action,) = actions
            assert isinstance(action, Send)
            assert isinstance(action.message, Add)
            worker = Worker(action.message, restored=3)
            tokens = left.pop(0) if left else len(TEXT)
            for _ in range(tokens):
                now_s += 1.0
                outputs = streams.accept(action.worker, {"r": worker.attempt}, [worker.next(now_s)], now_s)
                done = processor.process_outputs(outputs, now_s, statistics)
                streams.abort(done.reqs_to_abort)
                item = queue.get_nowait()
                if item is not None:
                    received.append(item)
                if "r" not in streams.live:
                    return received, statistics
            actions = streams.worker_down(action.worker, "killed", now_s)
            streams.worker_up(action.worker, 2, now_s)
        return received, statistics

    return asyncio.run(run())


def seen(outputs: list[Any]) -> list[Any]:
    """All that a client could see."""
    return [
        (
            output.finished,
            output.num_cached_tokens,
            output.prompt_logprobs,
            [
                (text.text, list(text.token_ids), text.logprobs, text.finish_reason, text.stop_reason)
                for text in output.outputs
            ],
        )
        for output in outputs
    ]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
@pytest.mark.parametrize("stop", [None, ["lmn"]], ids=["to the end", "stop string across tokens"])
@pytest.mark.parametrize("lost_after", [(0,), (1,), (3,), (5,), (0, 0, 2, 1), (2, 0, 1)])
def test_a_text_that_moved_is_as_if_it_had_not(
    lost_after: tuple[int, ...], kind: RequestOutputKind, stop: list[str] | None
) -> None:
    expected, statistics = life(kind=kind, stop=stop)
    moved, after = life(*lost_after, kind=kind, stop=stop)
    assert seen(moved) == seen(expected)
    assert expected[0].prompt_logprobs, "the test's own engine sends them"
    (finished,), (reference,) = after.finished_requests, statistics.finished_requests
    assert finished.queued_time >= 0
    assert finished.num_cached_tokens == 0, "what is restored is no hit of a cache"
    assert finished.num_generation_tokens == reference.num_generation_tokens
    assert after.num_generation_tokens == statistics.num_generation_tokens
    assert after.prompt_token_stats.total == len(PROMPT)
