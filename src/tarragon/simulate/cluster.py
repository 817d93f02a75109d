"""draft sim"""
from __future__ import annotations
import heapq, random, time
from collections.abc import Callable
from typing import Any
import msgspec
from tarragon.config import Config
from tarragon.experts.batcher import Batcher, Knobs, RunBatch, WaitUntil
from tarragon.messages import DataFlag


class Load(msgspec.Struct, frozen=True, kw_only=True):
    moe_layers: int = 12
    steps: int = 30
    layer_us: int = 1000
    layer_jitter: float = 0.2
    between_us: int = 2000
    hop_us: int = 20
    decode_pairs: tuple[int, int] = (16, 64)
    prefill_share: float = 0.1
    prefill_pairs: tuple[int, int] = (600, 4000)
    prefill_layer_us: int = 5000
    idle_share: float = 0.1
    idle_us: int = 5000
    serve_fixed_us: int = 1000
    serve_pair_us: float = 5.0
    attention_crashes: int = 0
    expert_crashes: int = 0
    detect_us: tuple[int, ...] = (50, 50, 50, 30_000)
    rejoin_us: int = 20_000
    paces: tuple[float, ...] = (1.0,)


class AW:
    def __init__(self, sim: "Sim", name: str, epoch: int) -> None:
        self.sim, self.name, self.epoch = sim, name, epoch
        self.key = (name, epoch)
        self.alive = True
        self.step = 0
        self.layer = 0
        self.in_step = False
        self.prefill = False
        self.experts: dict[tuple[str, int], EW] = {}
        self.announced: set[tuple[str, int]] = set()
        self.pending: dict[tuple[str, int], int] = {}
        self.replays: dict[tuple[str, int], int] = {}
        self.lag = False
        self.step_started = 0
        self.first_wait = 0
        self.dur: list[int] = []

    def next_step(self) -> None:
        sim, L = self.sim, self.sim.load
        if sim.todo[self.name] <= 0:
            if self.in_step:
                self.in_step = False
                self.send_all("end")
            return
        r = sim.random
        self.step += 1
        self.step_started = sim.now
        self.prefill = r.random() < L.prefill_share
        self.tokens = r.randint(*(L.prefill_pairs if self.prefill else L.decode_pairs))
        sim.todo[self.name] -= 1
        self.continues = sim.todo[self.name] > 0 and r.random() >= L.idle_share
        self.in_step = True
        self.layer = 0
        self.send_all("begin")
        self.compute()

    def send_all(self, what: str) -> None:
        for key, ew in self.experts.items():
            self.announced.add(key)
            self.sim.after(self.sim.load.hop_us, ew.on_announce, self, what, self.prefill)

    def compute(self) -> None:
        L = self.sim.load
        base = (L.prefill_layer_us if self.prefill else L.layer_us) * L.paces[int(self.name[3:]) % len(L.paces)]
        j = L.layer_jitter
        self.sim.after(int(base * (1 + self.sim.random.uniform(-j, j))), self.dispatch)

    def dispatch(self) -> None:
        if not self.alive:
            return
        sim = self.sim
        names = list(self.experts)
        cuts = [sim.random.random() + 0.3 for _ in names]
        total = sum(cuts)
        self.pending = {}
        self.replays = {}
        self.owed = {}
        if sim.random.random() < 0.1 and len(names) > 1:
            cuts[0] = 0.0
        for name, cut in zip(names, cuts):
            n = int(self.tokens * cut / total)
            self.pending[name] = n
            self.frame(name, n, DataFlag.NONE)

    def frame(self, name: tuple[str, int], pairs: int, extra: DataFlag) -> None:
        flags = extra | (DataFlag.PREFILL if self.prefill else DataFlag.NONE)
        if self.continues:
            flags |= DataFlag.CONTINUES
        self.sim.sent += 1
        self.sim.after(self.sim.load.hop_us, self.experts[name].on_rows, self, self.layer, pairs, self.step, int(flags))

    def on_answer(self, ew: "EW", layer: int, step: int) -> None:
        if not self.alive:
            return
        assert (layer, step) == (self.layer, self.step), "answer of another layer"
        if ew.key not in self.experts:
            return
        assert ew.key in self.pending, "answered twice"
        self.sim.answers += 1
        again = self.replays.pop(ew.key, 0)
        if again:
            self.pending[ew.key] = again
            self.frame(ew.key, again, DataFlag.PRIORITY)
            return
        del self.pending[ew.key]
        self.done_layer()

    def done_layer(self) -> None:
        if self.pending:
            return
        sim, L = self.sim, self.sim.load
        self.layer += 1
        if self.layer < L.moe_layers:
            self.compute()
            return
        (self.dur if not self.prefill else sim.prefill_steps).append(sim.now - self.step_started)
        sim.finished += 1
        if self.continues:
            j = L.layer_jitter
            sim.after(int(L.between_us * (1 + sim.random.uniform(-j, j))), self.go)
        else:
            self.in_step = False
            sim.after(int(sim.random.random() * L.idle_us) + L.between_us, self.go)

    def go(self) -> None:
        if self.alive:
            self.next_step()

    def lost(self, ew: "EW") -> None:
        if not self.alive or ew.key not in self.experts:
            return
        del self.experts[ew.key]
        owed = self.pending.pop(ew.key, None)
        if owed is None:
            return
        owed += 0
        self.replays.pop(ew.key, None)
        if owed:
            to = self.sim.random.choice(list(self.experts))
            if to in self.pending:
                self.replays[to] = self.replays.get(to, 0) + owed
            else:
                self.pending[to] = owed
                self.frame(to, owed, DataFlag.PRIORITY)
        else:
            self.done_layer()


class EW:
    def __init__(self, sim: "Sim", name: str, epoch: int) -> None:
        self.sim, self.name, self.epoch = sim, name, epoch
        self.key = (name, epoch)
        self.alive = True
        self.batcher = Batcher(sim.load.moe_layers, sim.config, sim.knobs)
        self.busy = False
        self.timer = 0
        self.busy_us = 0
        self.by_key: dict[Any, AW] = {}
        self.expired = 0

    def on_announce(self, aw: AW, what: str, prefill: bool) -> None:
        if not self.alive or aw.key not in self.batcher._workers:
            return
        if what == "begin":
            self.timed(self.batcher.step_begin, aw.key, 0, self.sim.now, prefill)
        else:
            self.timed(self.batcher.step_end, aw.key, self.sim.now)
        self.poll()

    def timed(self, f: Callable[..., Any], *a: Any) -> Any:
        t = time.perf_counter_ns()
        r = f(*a)
        self.sim.cost_ns += time.perf_counter_ns() - t
        return r

    def join(self, aw: AW) -> None:
        if self.alive:
            self.by_key[aw.key] = aw
            self.batcher.worker_joined(aw.key, self.sim.now)

    def left(self, aw: AW) -> None:
        if self.alive:
            self.batcher.worker_left(aw.key, self.sim.now)
            self.poll()

    def on_rows(self, aw: AW, layer: int, pairs: int, step: int, flags: int) -> None:
        if not self.alive or aw.key not in self.batcher._workers:
            return
        self.sim.events += 1
        if self.timed(self.batcher.rows, aw.key, layer, pairs, step, flags, self.sim.now):
            self.sim.after(self.sim.load.hop_us, aw.on_answer, self, layer, step)
        self.poll()

    def poll(self) -> None:
        if self.busy or not self.alive:
            return
        sim = self.sim
        act = self.timed(self.batcher.next_action, sim.now)
        e = self.batcher.stats.waits_expired
        if e > self.expired:
            if sim.now < sim.disturbed_until:
                sim.expired_failure += e - self.expired
            else:
                sim.expired_clean += e - self.expired
            self.expired = e
        if isinstance(act, RunBatch):
            self.busy = True
            t = int(sim.load.serve_fixed_us + sim.load.serve_pair_us * act.pairs)
            t = int(t * sim.random.uniform(0.95, 1.05))
            self.busy_us += t
            sim.after(t, self.done)
        elif isinstance(act, WaitUntil):
            assert act.deadline_us > sim.now
            self.timer += 1
            sim.at(act.deadline_us, self.on_timer, self.timer)

    def on_timer(self, n: int) -> None:
        if n == self.timer:
            self.poll()

    def done(self) -> None:
        if not self.alive:
            return
        self.busy = False
        self.sim.events += 1
        for m in self.timed(self.batcher.batch_done, self.sim.now):
            self.sim.after(self.sim.load.hop_us, self.by_key[m.key].on_answer, self, m.layer, m.step)
        self.poll()


class Sim:
    def __init__(self, seed: int, aws: int, ews: int, load: Load, config: Config, knobs: type[Knobs]) -> None:
        self.random = random.Random(seed)
        self.load, self.config, self.knobs = load, config, knobs
        self.heap: list[Any] = []
        self.seq = 0
        self.now = 0
        self.sent = self.answers = self.finished = self.events = self.cost_ns = 0
        self.disturbed_until = 0
        self.expired_clean = self.expired_failure = 0
        self.prefill_steps: list[int] = []
        self.epoch = 0
        self.ews = [EW(self, f"ew-{i}", self.next_epoch()) for i in range(ews)]
        self.all_ews = list(self.ews)
        self.aws: list[AW] = []
        self.all_aws: list[AW] = []
        self.todo = {f"aw-{i}": load.steps for i in range(aws)}
        for i in range(aws):
            self.start_aw(f"aw-{i}", int(self.random.random() * 20_000))
        horizon = load.steps * load.moe_layers * (load.layer_us + load.serve_fixed_us)
        for _ in range(load.attention_crashes):
            self.at(int(self.random.random() * horizon), self.crash_aw)
        for _ in range(load.expert_crashes):
            self.at(int(self.random.random() * horizon), self.crash_ew)

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def start_aw(self, name: str, delay: int) -> None:
        aw = AW(self, name, self.next_epoch())
        self.all_aws.append(aw)
        def begin() -> None:
            self.aws.append(aw)
            for ew in self.ews:
                aw.experts[ew.key] = ew
                ew.join(aw)
            aw.next_step()
        self.after(delay, begin)

    def crash_aw(self) -> None:
        if not self.aws:
            return
        aw = self.random.choice(self.aws)
        self.aws.remove(aw)
        aw.alive = False
        self.todo[aw.name] += 1 if aw.in_step else 0
        detect = self.random.choice(self.load.detect_us)
        self.disturbed_until = max(self.disturbed_until, self.now + detect + 20_000)
        for ew in self.ews:
            self.after(detect + self.random.randint(0, 100), ew.left, aw)
        self.start_aw(aw.name, detect + self.load.rejoin_us)

    def crash_ew(self) -> None:
        if len(self.ews) < 2:
            return
        ew = self.random.choice(self.ews)
        self.ews.remove(ew)
        ew.alive = False
        detect = self.random.choice(self.load.detect_us)
        self.disturbed_until = max(self.disturbed_until, self.now + detect + 20_000)
        for aw in self.aws:
            self.after(detect + self.random.randint(0, 100), aw.lost, ew)
        new = EW(self, ew.name, self.next_epoch())
        self.all_ews.append(new)
        def begin() -> None:
            self.ews.append(new)
            for aw in self.aws:
                aw.experts[new.key] = new
                new.join(aw)
        self.after(detect + self.load.rejoin_us, begin)

    def at(self, t: int, f: Callable[..., None], *a: Any) -> None:
        self.seq += 1
        heapq.heappush(self.heap, (t, self.seq, f, a))

    def after(self, d: int, f: Callable[..., None], *a: Any) -> None:
        self.at(self.now + d, f, *a)

    def run(self) -> dict[str, Any]:
        n = 0
        while self.heap:
            self.now, _, f, a = heapq.heappop(self.heap)
            f(*a)
            n += 1
            assert n < 2_000_000
        assert all(v == 0 for v in self.todo.values()), self.todo
        bs = [e.batcher.stats for e in self.all_ews]
        tot = lambda n: sum(getattr(b, n) for b in bs)
        durs = [d for a in self.all_aws for d in a.dur]
        return dict(
            us=self.now, s0=sum(d for a in self.all_aws if a.name=="aw-0" for d in a.dur) / max(1,sum(len(a.dur) for a in self.all_aws if a.name=="aw-0")), step=sum(durs) / max(1, len(durs)), p99=sorted(durs)[int(len(durs)*.99)], fill=tot("decode_members") / max(1, tot("decode_batches")),
            pre=sum(self.prefill_steps) / max(1, len(self.prefill_steps)),
            waits=tot("waits"), clean=self.expired_clean, failure=self.expired_failure,
            waitshare=tot("waited_us") / (self.now * len(self.ews)), busy=sum(e.busy_us for e in self.all_ews) / (self.now * len(self.ews)),
            cost=self.cost_ns / max(1, self.events) / 1000,
        )


def run(seed: int, aws: int, ews: int, load: Load | None = None, config: Config | None = None, knobs: type[Knobs] = Knobs) -> dict[str, Any]:
    return Sim(seed, aws, ews, load or Load(), config or Config(), knobs).run()
