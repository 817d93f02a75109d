"""What must be different about a request, and about its outputs, when another worker goes on with it?

vLLM's front end keeps the text, stop strings, log-probs, usage and siblings of a request; it only needs the
new tokens. What it would take for news a second time is taken out here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest

from tarragon.gateway.wire import Origin

GREEDY_TEMPERATURE_MAX = 1e-5
"""vLLM samples greedily below this temperature."""


def with_seed(request: EngineCoreRequest, draw: Callable[[], int]) -> EngineCoreRequest:
    """Return the request with a seed if it samples without one, so that any worker continues it alike.

    Children of one request share their parameters, so these are copied: each child gets its own seed.
    """
    params: Any = request.sampling_params
    assert params is not None, "only text generation reaches the gateway's client"
    if params.seed is not None or params.temperature < GREEDY_TEMPERATURE_MAX:
        return request
    return _changed(request, seed=draw())


def for_another_worker(
    request: EngineCoreRequest, sent: Sequence[int], origins: Sequence[Origin]
) -> tuple[EngineCoreRequest, list[Origin]]:
    """Return what another worker is to be given, now that ``sent`` has left for the client.

    Log-probs of the prompt come with the first token. After that nobody wants them; before it the whole
    prompt has to be computed, as restored rows yield none.
    """
    if request.sampling_params.prompt_logprobs is None:
        return request, list(origins)
    if sent:
        return _changed(request, prompt_logprobs=None), list(origins)
    return request, []


def as_continuation(output: EngineCoreOutput, *, anew: bool) -> None:
    """Take out of a later attempt's output, in place, what belongs to the first attempt alone.

    ``anew``: the client has got nothing yet, so that this attempt's prefill is the one that counts; but
    what was restored for it is no hit of a cache. Otherwise the front end has had the prompt's log-probs,
    and a second time of queueing would make its statistics negative.
    """
    stats = output.prefill_stats
    if anew:
        if stats is not None:
            stats.num_computed_tokens += stats.num_external_cached_tokens
            stats.num_cached_tokens -= stats.num_external_cached_tokens
            stats.num_external_cached_tokens = 0
        return
    output.prefill_stats = None
    output.new_prompt_logprobs_tensors = None
    output.prompt_token_id_logprobs = None
    if output.events:
        output.events = [event for event in output.events if event.type != EngineCoreEventType.QUEUED] or None


def _changed(request: EngineCoreRequest, **changes: Any) -> EngineCoreRequest:
    """Return a copy of ``request`` with a copy of its parameters, changed."""
    changed = copy.copy(request)
    changed.sampling_params = copy.copy(request.sampling_params)
    for name, value in changes.items():
        setattr(changed.sampling_params, name, value)
    return changed
