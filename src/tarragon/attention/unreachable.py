"""A step that could not be finished, because no live worker hosts one of its experts, fails its requests.

They have waited as long as ``expert_unreachable_timeout_s`` allows. The worker itself is well: other requests
are served afterwards, as soon as there is a host again.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from tarragon.refe.engine import ExpertUnreachable


def fail_step(engine: Any, error: ExpertUnreachable) -> dict[int, EngineCoreOutputs]:
    """Take the running requests out of the engine after its step has raised; returns what to tell.

    ``stop_reason`` of each output is the sentence that the client gets.
    """
    scheduler = engine.scheduler
    names = [request.request_id for request in scheduler.running]
    manager = scheduler.kv_cache_manager
    blocks = {block for name in names for group in manager.get_block_ids(name) for block in group}
    failed = scheduler.finish_requests(names, RequestStatus.FINISHED_ERROR)
    # The scheduler entered them as cached when it planned the step; their rows were never computed.
    manager.evict_blocks(blocks)
    outputs = [
        EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            stop_reason=str(error),
        )
        for request in failed
    ]
    return {0: EngineCoreOutputs(outputs=outputs)}
