"""Which attention worker runs a request: pure bookkeeping and one decision.

Load is counted in tokens that the next steps must compute: a request in prefill weighs its whole prompt,
a request that decodes weighs one token per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


def sibling_group(request_id: str) -> str | None:
    """Return what the children of one request for ``n`` texts have in common, or None for an only child.

    vLLM names child ``i`` of request ``r`` ``"i_r"``. A client's own id of that form does no harm: ids end
    in random characters, so that a group of one results.
    """
    index, separator, parent = request_id.partition("_")
    return parent if separator and index.isdecimal() else None


@dataclass
class Load:
    """What one worker has been given and not finished."""

    running: dict[str, int] = field(default_factory=dict)
    """Prompt tokens left of each request; 0 once its first token came."""
    prompt_tokens: int = 0
    """The sum of these."""
    groups: dict[str, int] = field(default_factory=dict)
    """Requests here of each sibling group: their prompt is, or will be, in this worker's prefix cache."""

    @property
    def tokens(self) -> int:
        """Prompt tokens left plus one per running request."""
        return self.prompt_tokens + len(self.running)

    def add(self, request_id: str, prompt_tokens: int) -> None:
        """Count a request in. Its siblings' prompt is not counted twice: the prefix cache serves it."""
        assert request_id not in self.running, request_id
        group = sibling_group(request_id)
        left = 0 if group is not None and group in self.groups else prompt_tokens
        self.running[request_id] = left
        self.prompt_tokens += left
        if group is not None:
            self.groups[group] = self.groups.get(group, 0) + 1

    def first_token(self, request_id: str) -> None:
        """The request's prompt is computed."""
        if request_id in self.running:
            self.prompt_tokens -= self.running[request_id]
            self.running[request_id] = 0

    def remove(self, request_id: str) -> None:
        """Count a request out; unknown ones are ignored, as an end may be reported twice."""
        if request_id not in self.running:
            return
        self.prompt_tokens -= self.running.pop(request_id)
        group = sibling_group(request_id)
        if group is not None:
            self.groups[group] -= 1
            if not self.groups[group]:
                del self.groups[group]


def choose(
    loads: Mapping[str, Load], request_id: str, prompt_tokens: int, avoid: Iterable[str] = ()
) -> str | None:
    """Return the worker that would be least loaded with the request, or None if ``loads`` is empty.

    A worker that runs a sibling needs not compute the prompt again, so siblings stay together until that
    worker is behind by more than their prompt. Ties go to the smallest id. Workers in ``avoid`` are taken
    only if there are no others.
    """
    avoided = set(avoid)
    candidates = [name for name in loads if name not in avoided] or list(loads)
    group = sibling_group(request_id)

    def cost(name: str) -> tuple[int, str]:
        cached = group is not None and group in loads[name].groups
        return loads[name].tokens + (0 if cached else prompt_tokens), name

    return min(candidates, key=cost, default=None)
