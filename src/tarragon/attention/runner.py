"""vLLM's CPU model runner, with step announcements, checkpoints and stateless randomness."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tarragon.attention.checkpoints import Checkpoints
from tarragon.attention.randomness import seed_for_positions
from tarragon.attention.remote_experts import RemoteExperts
from tarragon.attention.times import TIMES


class AttentionModelRunner(CPUModelRunner):
    """One forward pass = one step: announced to every expert worker before its first layer (5.2)."""

    checkpoints: ClassVar[Checkpoints | None] = None
    """Set once the engine stands."""
    _step: Any = None
    """What the scheduler ordered for the step under way."""

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tokens, checkpoints = scheduler_output.total_num_scheduled_tokens, self.checkpoints
        if checkpoints is not None:
            checkpoints.begin(scheduler_output)
        if tokens:
            RemoteExperts.refe.begin_step(tokens)
        self._step = scheduler_output
        with TIMES.taken("forward_s"):
            result = super().execute_model(scheduler_output, *args, **kwargs)
        if checkpoints is not None and tokens:
            checkpoints.end(scheduler_output)
        return result

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with TIMES.taken("sample_s"):
            return super().sample_tokens(*args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.checkpoints is not None and self._step is not None:
            self.checkpoints.load(self._step)
            self._step = None
        return super()._model_forward(*args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        seed_for_positions(self.input_batch.generators, self.input_batch.req_ids, self.requests)
        return super()._sample(*args, **kwargs)


def install() -> None:
    """Make vLLM's CPU worker build this runner (once per process)."""
    from vllm.v1.worker import cpu_worker

    cpu_worker.CPUModelRunner = AttentionModelRunner
