"""vLLM's CPU model runner, with step announcements and stateless randomness."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tarragon.attention.randomness import seed_for_positions
from tarragon.attention.remote_experts import RemoteExperts


class AttentionModelRunner(CPUModelRunner):
    """One forward pass = one step: announced to every expert worker before its first layer (5.2)."""

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens:
            RemoteExperts.refe.begin_step(tokens, continues=True)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        seed_for_positions(self.input_batch.generators, self.input_batch.req_ids, self.requests)
        return super()._sample(*args, **kwargs)


def install() -> None:
    """Make vLLM's CPU worker build this runner (once per process)."""
    from vllm.v1.worker import cpu_worker

    cpu_worker.CPUModelRunner = AttentionModelRunner
