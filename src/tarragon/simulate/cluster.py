"""Seeded simulation of expert batching: the real batchers under invented traffic and failures (5.2, 5.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from random import Random

from tarragon.config import Config
from tarragon.simulate.audit import Audit, WorkerKey
from tarragon.simulate.clock import Clock
from tarragon.simulate.load import LOADS, Load
from tarragon.simulate.report import Report
from tarragon.simulate.workers import AttentionWorker, ExpertWorker

_SLOWDOWN_MAX = 100
"""A run that takes this much longer than its work, done one by one, stands still."""


def run(
    seed: int,
    attention_workers: int = 2,
    expert_workers: int = 2,
    load: Load | None = None,
    config: Config | None = None,
    *,
    name: str = "",
    measure: bool = False,
) -> Report:
    """Simulate one cluster until its work is done.

    Args:
        seed: the same seed gives the same report.
        load: traffic, timings and faults; ``config``: the batcher's settings.
        name: of the load, for the report.
        measure: also measure the batcher's real cost per event, which no seed repeats.
    """
    cluster = Cluster(
        seed, attention_workers, expert_workers, load or Load(), config or Config(), measure=measure
    )
    return cluster.run(name)


def sweep(
    seeds: Iterable[int],
    attention_workers: Iterable[int] = (2, 3, 4),
    expert_workers: Iterable[int] = (1, 2, 3, 4),
    loads: Mapping[str, Load] | None = None,
    config: Config | None = None,
    *,
    measure: bool = False,
) -> Iterator[Report]:
    """One run for every seed and load. The shapes of the cluster take turns: few seeds see them all."""
    shapes = [(aws, ews) for aws in attention_workers for ews in expert_workers]
    for seed in seeds:
        for number, (name, load) in enumerate((LOADS if loads is None else loads).items()):
            aws, ews = shapes[(seed + number) % len(shapes)]
            yield run(seed, aws, ews, load, config, name=name, measure=measure)


class Cluster:
    """All workers of one run, who starts and who dies."""

    def __init__(
        self,
        seed: int,
        attention_workers: int,
        expert_workers: int,
        load: Load,
        config: Config,
        *,
        measure: bool = False,
    ) -> None:
        self.seed, self.load, self.config, self.measure = seed, load, config, measure
        self.random = Random(seed)  # noqa: S311 - repeatable, not secret
        self.clock = Clock()
        self.audit = Audit(config.batch_pairs_max)
        self.replayed = 0
        self.expired_in_faults = 0
        self._epoch = 0
        self._disturbed_until_us = -1
        self._decode_us: dict[float, list[int]] = {}
        self._steps_ended = 0
        self._names = [f"aw-{i}" for i in range(attention_workers)]
        self._paces = {name: load.paces[i % len(load.paces)] for i, name in enumerate(self._names)}
        self._todo = dict.fromkeys(self._names, load.steps)
        self._attention: list[AttentionWorker] = []
        self._experts = [ExpertWorker(self, f"ew-{i}", self._next_epoch()) for i in range(expert_workers)]
        self._experts_ever = list(self._experts)
        for name in self._names:
            self.clock.after(self.random.randint(0, load.pause_us), self._start_attention, name)
        for _ in range(load.attention_crashes):
            self.clock.after(self.random.randint(0, self._work_us()), self._crash_attention)
        for _ in range(load.expert_crashes):
            self.clock.after(self.random.randint(0, self._work_us()), self._crash_expert)

    def run(self, name: str = "") -> Report:
        horizon_us = _SLOWDOWN_MAX * len(self._names) * int(self._work_us() * max(self.load.paces))
        ended = self.clock.run(horizon_us)
        self.audit.finished(ended and not any(self._todo.values()))
        return self._report(name)

    def _work_us(self) -> int:
        """About the time of one attention worker's steps without any contention."""
        load = self.load
        return load.steps * (load.moe_layers * (load.layer_us + load.batch_us) + load.between_steps_us)

    # ------------------------------------------------------------------ for the workers

    def has_steps(self, name: str) -> bool:
        return self._todo[name] > 0

    def take_step(self, name: str) -> bool:
        if not self._todo[name]:
            return False
        self._todo[name] -= 1
        return True

    def step_ended(self, pace: float, duration_us: int, prefill: bool) -> None:
        self._steps_ended += 1
        if not prefill:
            self._decode_us.setdefault(pace, []).append(duration_us)

    def wait_expired(self, expert: WorkerKey) -> None:
        if self.clock.now <= self._disturbed_until_us:
            self.expired_in_faults += 1
        else:
            self.audit.demand(
                False, f"a wait of {expert} reached its bound at {self.clock.now} us, without a failure"
            )

    # ------------------------------------------------------------------ starts and failures

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _start_attention(self, name: str) -> None:
        worker = AttentionWorker(self, name, self._next_epoch(), self._paces[name])
        self._attention.append(worker)
        for expert in self._experts:
            worker.connect(expert)
        worker.next_step()

    def _start_expert(self, name: str) -> None:
        expert = ExpertWorker(self, name, self._next_epoch())
        self._experts.append(expert)
        self._experts_ever.append(expert)
        for worker in self._attention:
            worker.connect(expert)

    def _notice_us(self) -> int:
        hangs = self.random.random() < self.load.hang_share
        notice_us = self.load.probe_us if hangs else self.load.notice_us
        # What waited for the dead, or for those who waited for the dead, may reach its bound.
        until_us = self.clock.now + notice_us + 2 * self.config.batch_join_wait_us_max
        self._disturbed_until_us = max(self._disturbed_until_us, until_us)
        return notice_us

    def _crash_attention(self) -> None:
        if not self._attention:
            return
        worker = self.random.choice(self._attention)
        self._attention.remove(worker)
        worker.alive = False
        self.audit.died(worker.key)
        if worker.in_step:
            self._todo[worker.key[0]] += 1
        notice_us = self._notice_us()
        for expert in self._experts:
            self.clock.after(notice_us + self.random.randint(0, 100), expert.on_left, worker)
        self.clock.after(notice_us + self.load.restart_us, self._start_attention, worker.key[0])

    def _crash_expert(self) -> None:
        if len(self._experts) < 2:
            return  # the last replica's loss is the orchestrator's business
        expert = self.random.choice(self._experts)
        self._experts.remove(expert)
        expert.alive = False
        expert.died_us = self.clock.now
        self.audit.died(expert.key)
        notice_us = self._notice_us()
        for worker in self._attention:
            self.clock.after(notice_us + self.random.randint(0, 100), worker.on_lost, expert)
        self.clock.after(notice_us + self.load.restart_us, self._start_expert, expert.key[0])

    # ------------------------------------------------------------------ figures

    def _cost_us(self) -> float:
        """Real time in the batchers, without the slowest 2 % of calls: the machine did something else."""
        costs_ns = sorted(cost for expert in self._experts_ever for cost in expert.costs_ns)
        return sum(costs_ns[: len(costs_ns) * 98 // 100]) / 1000

    def _report(self, name: str) -> Report:
        experts, now = self._experts_ever, self.clock.now
        stats = [expert.batcher.stats for expert in experts]
        decode_us = sorted(us for times in self._decode_us.values() for us in times) or [0]
        lived_us = sum((now if e.died_us is None else e.died_us) - e.born_us for e in experts) or 1
        batches = sum(s.batches for s in stats)
        events = sum(expert.events for expert in experts)
        return Report(
            load=name,
            seed=self.seed,
            attention_workers=len(self._names),
            expert_workers=len(self._experts),
            simulated_us=now,
            steps=self._steps_ended,
            decode_step_us=sum(decode_us) / len(decode_us),
            decode_step_us_by_pace={
                str(pace): sum(times) / len(times) for pace, times in sorted(self._decode_us.items())
            },
            decode_step_us_p99=decode_us[int(len(decode_us) * 0.99)],
            frames=self.audit.frames,
            replayed_frames=self.replayed,
            batches=batches,
            batch_fill=sum(s.decode_members for s in stats) / max(1, sum(s.decode_batches for s in stats)),
            pairs_per_batch=sum(s.pairs for s in stats) / max(1, batches),
            waits=sum(s.waits for s in stats),
            waits_expired_in_faults=self.expired_in_faults,
            waiting_share=sum(s.waited_us for s in stats) / lived_us,
            busy_share=sum(expert.busy_us for expert in experts) / lived_us,
            events=events,
            event_cost_us=self._cost_us() / max(1, events),
            violations=tuple(self.audit.violations),
        )
