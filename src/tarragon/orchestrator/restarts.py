"""When is a dead worker started again? Once those who go on have resumed; later in a crash loop. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tarragon.config import Config


@dataclass
class _Restart:
    crashes: int = 0
    due_s: float | None = None
    given_up: bool = False


class Restarts:
    """Counts early deaths in a row. The first costs no backoff, each further one twice the last."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._workers: dict[str, _Restart] = {}

    def died(
        self, worker_id: str, healthy_for_s: float | None, now_s: float, *, meant: bool, others_go_on: bool
    ) -> float | None:
        """Plan the restart of a worker; return when, or None if it is given up.

        ``healthy_for_s`` is None if it never became ready; ``meant`` says that a person ended it.
        ``others_go_on``: its work is others' now, whom a start in the same moment would slow down.
        """
        entry = self._workers.setdefault(worker_id, _Restart())
        early = healthy_for_s is None or healthy_for_s < self._config.crash_loop_uptime_s
        if early and not meant:
            entry.crashes += 1
        else:
            entry.crashes = 0
        if entry.crashes > self._config.crash_loop_restarts_max:
            entry.given_up, entry.due_s = True, None
            return None
        pause_s = self._config.replacement_pause_s if others_go_on else 0.0
        entry.due_s = now_s + max(pause_s, self._backoff_s(entry.crashes))
        return entry.due_s

    def due(self, now_s: float) -> list[str]:
        """Workers whose time has come, by id."""
        return sorted(i for i, e in self._workers.items() if e.due_s is not None and e.due_s <= now_s)

    def started(self, worker_id: str) -> None:
        """The worker is being started: nothing is due for it."""
        entry = self._workers.setdefault(worker_id, _Restart())
        entry.due_s, entry.given_up = None, False

    def forget(self, worker_id: str) -> None:
        """Forget the worker and its crashes."""
        self._workers.pop(worker_id, None)

    def given_up(self, worker_id: str) -> bool:
        return worker_id in self._workers and self._workers[worker_id].given_up

    def crashes(self, worker_id: str) -> int:
        """Early deaths in a row."""
        return self._workers[worker_id].crashes if worker_id in self._workers else 0

    def _backoff_s(self, crashes: int) -> float:
        if crashes < 2:
            return 0.0
        return min(self._config.restart_backoff_s_max, self._config.restart_backoff_s * 2.0 ** (crashes - 2))
