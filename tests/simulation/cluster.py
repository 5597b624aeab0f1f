"""A whole run in one thread over a virtual clock, and everything that can happen to it, drawn from one seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from codistill.config.experiment import Experiment, parse
from codistill.config.fingerprint import identity
from codistill.peer.session import Session
from codistill.peer.steps import Failure
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill_server.coordinator import Coordinator
from codistill_server.rounds.actions import Decide
from simulation.kernel import Arm, Kernel
from simulation.model import BATCH, CLASSES, HELD_OUT, ROUNDS_PER_EPOCH, GoingOn, Ledger, Reference, Violation
from simulation.network import CLIENT_KEEPALIVE, SERVER_KEEPALIVE, Link, Stream, Weather
from simulation.server import DiskJournal, Server
from simulation.worker import Disk, Store, Worker

__all__ = ["Cluster", "Outcome", "Plant", "simulate"]

_NAMES = ("ant", "bee", "cat", "dog")
_METHODS: tuple[Mapping[str, Any], ...] = (
    {"method": "kdcl", "ensemble": "min_logit"},
    {"method": "kdcl", "ensemble": "general"},
    {"method": "dml"},
    {"method": "kdcl", "ensemble": "naive"},
)
_CALM_SECONDS = 75.0
"""Virtual seconds after the last fault, training apart, in which the run must be complete: a keepalive and some pauses."""


@dataclass(frozen=True)
class Plant:
    """The parts of the cluster; a test replaces a part by one with a bug in it."""

    coordinator: Callable[..., Coordinator] = Coordinator
    session: Callable[[str, float, float, float], Session] = Session
    journal: Callable[[Any, str], DiskJournal] = DiskJournal
    store: Callable[[Disk], Store] = Store
    ledger: Callable[[Reference], Ledger] | None = None
    proceed: bool | None = None


@dataclass
class Outcome:
    """The outcome of a seed."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter[str])
    endings: Counter[str] = field(default_factory=Counter[str])
    remarks: Counter[str] = field(default_factory=Counter[str])
    rounds: int = 0
    answers: int = 0
    virtual_seconds: float = 0.0
    violation: str | None = None


_REFERENCES: dict[tuple[str, int], tuple[Experiment, str, Reference]] = {}


def _experiment(
    method: int, count: int, keep_all: bool, proceed: bool, rounds: int
) -> tuple[Experiment, str, Reference]:
    key = f"{method} {count} {keep_all} {proceed}", rounds
    if key not in _REFERENCES:
        document = {
            "name": "simulated",
            "data": {"dataset": "somewhere:make", "classes": CLASSES},
            "training": {"epochs": rounds // ROUNDS_PER_EPOCH, "batch_size": BATCH},
            "distillation": dict(_METHODS[method]),
            "exchange": {"waiting_notice": 5, "journal": {"keep": "all" if keep_all else "needed"}},
            "students": [{"name": name, "model": "mlp"} for name in _NAMES[:count]],
        }
        if proceed:
            document["exchange"] |= {"on_absence": "proceed", "quorum": 2, "round_deadline": 3.0, "evict_after": 15.0}
        if _METHODS[method].get("ensemble") == "general":
            document["data"]["held_out"] = HELD_OUT
        experiment = parse(yaml.safe_dump(document))
        _REFERENCES[key] = experiment, identity(experiment), Reference(experiment, rounds)
    return _REFERENCES[key]


class Cluster:
    """The machines, the network between them, who restarts what died, and the faults."""

    def __init__(self, seed: int, plant: Plant, trace: Callable[[str], None] | None = None) -> None:
        draw = self.draw = random.Random(seed)
        self.kernel = Kernel()
        self.kernel.trace = trace
        self.plant = plant
        self.outcome = Outcome(seed)
        self.faults = self.outcome.faults
        count = draw.choice((2, 2, 3, 3, 4))
        self.rounds = draw.choice((4, 8, 12))
        method, keep_all, proceed = draw.randrange(len(_METHODS)), draw.random() < 0.2, draw.random() < 0.3
        proceed = proceed if plant.proceed is None else plant.proceed
        self.experiment, self.identity, reference = _experiment(method, count, keep_all, proceed, self.rounds)
        self.ledger = (plant.ledger or (GoingOn if proceed else Ledger))(reference)
        self.connect_timeout, self.give_up_after = 40.0, draw.choice((45.0, 45.0, 120.0))
        self.silence_after = 3 * self.experiment.exchange.waiting_notice + 2
        self.step_seconds = draw.choice((0.2, 1.0, 5.0))
        self.load_seconds = draw.choice((0.1, 5.0))
        self.save_chance = draw.choice((0.1, 0.3, 1.0))
        self.slow_targets = draw.random() < 0.4
        self.faults_end = draw.uniform(10.0, 60.0 + self.rounds * self.step_seconds * 2)
        self.every = draw.choice((2.0, 6.0, 15.0))
        self.weather = Weather(
            delay=draw.choice((0.001, 0.05, 0.5)),
            tail=draw.choice((0.0, 3.0, 15.0)),
            lose_request=draw.choice((0.0, 0.02, 0.1)),
            lose_reply=draw.choice((0.0, 0.02, 0.1)),
        )
        if draw.random() < 0.25:
            self.weather.repeat, self.weather.overtake = 0.1, 0.1
        if draw.random() < 0.25:
            self.weather.damage, self.weather.swallow = 0.05, 0.02
        self.links = {name: Link(self.kernel, draw, self.weather, self.faults) for name in self.experiment.names}
        self.disks = {name: Disk() for name in self.experiment.names}
        self.workers: list[Worker] = []
        self.streams: list[Stream] = []
        self.done: set[str] = set()
        self.journal = plant.journal(self, self.identity)
        self.server = Server(self)
        self._calm = False
        self._started = 0
        self._turns: Counter[str] = Counter()

    def run(self) -> Outcome:
        """Run everything to its end.

        Raises:
            Violation: an invariant does not hold.
        """
        try:
            self.server.start()
            for name in self.experiment.names:
                self.start_worker(name)
            self._schedule_fault()
            self._watch()
            self.kernel.run(self.faults_end, self._over)
            self._calm_down()
            bound = _CALM_SECONDS + 1.5 * self.rounds * self.step_seconds
            self.kernel.run(self.faults_end + bound, lambda: self.server.complete)
            self._check_progress(bound)
            # A worker whose last goodbye was not answered looks for the server for a while yet.
            self.kernel.run(self.kernel.now + 3 * self.give_up_after, self._over)
            self._check_end()
        finally:
            self.journal.throw_away()
            self.outcome.rounds = len(self.ledger.closed)
            self.outcome.answers = self.ledger.answers
            self.outcome.virtual_seconds = self.kernel.now
        return self.outcome

    # Who starts what again

    def start_worker(self, student: str) -> Worker:
        worker = Worker(self, student, self.links[student], self.disks[student])
        rivals = self._alive(student)
        worker.overlapped = bool(rivals)
        for rival in rivals:
            rival.overlapped = True
        self.workers.append(worker)
        self._started += 1
        worker.order = self._started
        self.kernel.note(f"{student}: a process starts" + (f", beside {len(rivals)}" if rivals else ""))
        return worker

    def worker_ended(self, worker: Worker) -> None:
        student, code = worker.student, worker.code
        assert code is not None
        self.outcome.endings[code.name] += 1
        self.kernel.note(f"{student}: ends with {code.name}: {worker.line}")
        allowed = {ExitCode.OK, ExitCode.UNREACHABLE, ExitCode.GAVE_UP}
        if worker.stop:
            allowed.add(ExitCode.INTERRUPTED)
        if worker.rivals:
            allowed.add(ExitCode.SUPERSEDED)
        if worker.overlapped:  # another process of it went on from a later checkpoint than this one had loaded
            allowed.add(ExitCode.REFUSED)
        if code not in allowed:
            raise Violation(f"{student} ends with {code.name}: {worker.line}")
        if code is ExitCode.UNREACHABLE and self.server.complete:
            self.outcome.remarks["a student's last goodbye went unanswered, and the server had ended"] += 1
        if code is ExitCode.SUPERSEDED and not self._alive(student):
            self.outcome.remarks["superseded by a process that is gone"] += 1
        if code is ExitCode.OK:
            self.done.add(student)
        if not self._alive(student) and code is not ExitCode.OK:
            self._start_later(student)

    def _start_later(self, student: str) -> None:
        def start() -> None:
            if not self._alive(student) and not self.server.complete:
                self.start_worker(student)

        self.kernel.after(self._until_restart(0.2), start)

    def _until_restart(self, least: float) -> float:
        """Return how long what died stays away: some seconds, or for longer than the others wait."""
        slow = not self._calm and self.draw.random() < 0.1
        return self.draw.uniform(least, 1.5 * self.give_up_after if slow else 4.0)

    def server_died(self) -> None:
        if not self.server.complete:
            self.kernel.after(self._until_restart(0.1), self.server.start)

    def _asked_to_join(self, student: str, *, late: bool) -> None:
        """The student that is connected may be superseded now, whether or not the answer arrives."""
        alive = self._alive(student)
        if len(alive) > 1 or late:
            for worker in alive:
                worker.rivals += 1

    def decided(self, action: Decide) -> None:
        if len(action.contributions) < len(self.experiment.names):
            self.outcome.remarks[
                "a round closed without somebody" if action.targets else "a round closed below the quorum"
            ] += 1

    def _took_over(self, worker: Worker) -> None:
        """A worker was let in: a new one takes its turn after the others, and none that had a session gets another turn."""
        if not worker.turn or not worker.core.session_id:
            self._turns[worker.student] += 1
            worker.turn = self._turns[worker.student]
        elif worker.turn != self._turns[worker.student]:
            raise Violation(f"{worker.student}: an older process took the student back from a newer one")

    def _alive(self, student: str) -> list[Worker]:
        return [each for each in self.workers if each.student == student and each.alive]

    def _over(self) -> bool:
        return self.server.complete and not self.server.up and not any(each.alive for each in self.workers)

    def _watch(self) -> None:
        for worker in self.workers:
            worker.check_bound()
        self.workers = [each for each in self.workers if each.alive]
        self.streams = [each for each in self.streams if each.server_open or each.worker_open]
        if not self._over():
            self.kernel.after(5.0, self._watch)

    # The network

    def watch(self, stream: Stream) -> None:
        self.streams.append(stream)

    def call(self, worker: Worker, kind: str, request: Any, timeout: float) -> Arm:
        """A unary call: request and reply may be late or lost, each in its own right."""
        link = worker.link

        def arm(resume: Callable[[Any], None]) -> None:
            started = self.kernel.now
            self.kernel.after(timeout, lambda: resume(Failure("DEADLINE_EXCEEDED", "Deadline Exceeded")))
            lost = Failure("UNAVAILABLE", "the connection was lost")
            if link.happens(self.weather.lose_request, "request lost"):
                self.kernel.at(link.arrival(), lambda: resume(lost))
                return

            def answer(value: Any) -> None:
                self.kernel.note(f"{kind} {_brief(request)} -> {_brief(value)}")
                if kind == "join" and not isinstance(value, Failure):
                    self._took_over(worker)
                if link.happens(self.weather.lose_reply, "reply lost"):
                    value = lost
                link.carry(link.arrival(), lambda: resume(value))

            def execute() -> None:
                # A call that its caller has given up may still be carried out, or not.
                late = self.kernel.now - started >= timeout or not worker.alive
                if late and self.draw.random() < 0.5:
                    return
                if late and kind == "join":
                    self._count("join of a process that is gone")
                if kind == "join":
                    self._asked_to_join(request.participant, late=late)
                self.server.call(kind, request, answer)

            link.carry(link.arrival(), lambda: self.server.take(execute))
            if kind != "join" and link.happens(self.weather.repeat, "call doubled"):
                link.carry(link.arrival(), lambda: self.server.take(lambda: self._again(kind, request)))

        return arm

    def _again(self, kind: str, request: Any) -> None:
        self.server.call(kind, request, lambda _: None)

    # Faults

    def _schedule_fault(self) -> None:
        self.kernel.after(self.draw.expovariate(1 / self.every), self._fault)

    def _fault(self) -> None:
        if self._calm or self.kernel.now >= self.faults_end or self._over():
            return
        kinds = (
            self._kill_worker,
            self._kill_worker,
            self._stop_worker,
            self._pause_worker,
            self._replace_worker,
            self._another_worker,
            self._kill_server,
            self._kill_server_in_the_act,
            self._kill_server_in_the_act,
            self._terminate_server,
            self._pause_server,
            self._cut,
            self._partition,
            self._break_stream,
            self._break_stream,
        )
        self.draw.choice(kinds)()
        self._schedule_fault()

    def _count(self, what: str) -> None:
        self.faults[what] += 1
        self.kernel.note(f"FAULT {what}")

    def _some_worker(self) -> Worker | None:
        alive = [each for each in self.workers if each.alive]
        return self.draw.choice(alive) if alive else None

    def _kill_worker(self) -> None:
        worker = self._some_worker()
        if worker is None:
            return
        silently = self.draw.random() < 0.3
        self._count(f"worker killed{' with its machine' if silently else ''}: {worker.student}".split(":")[0])
        self.kernel.note(f"{worker.student}: killed")
        worker.kill(silently=silently)
        if not self._alive(worker.student):
            disk = self.disks[worker.student]
            # Not one of the end: the student has told, and its last checkpoint was synced before that.
            known = disk.newest is not None and disk.previous is not None and disk.newest[0] < self.rounds
            if known and self.draw.random() < 0.5:
                self._count("checkpoint torn")
                disk.torn = True
            self._start_later(worker.student)

    def _stop_worker(self) -> None:
        worker = self._some_worker()
        if worker is not None:
            self._count("worker asked to stop")
            worker.ask_to_stop()

    def _replace_worker(self) -> None:
        """Somebody takes a process that is stopped for dead, and starts another."""
        worker = self._some_worker()
        if worker is not None and len(self._alive(worker.student)) < 3 and worker.student not in self.done:
            self._pause(worker)
            self._count("another process of a student")
            self.start_worker(worker.student)

    def _pause_worker(self) -> None:
        worker = self._some_worker()
        if worker is not None:
            self._pause(worker)

    def _pause(self, worker: Worker) -> None:
        if worker.process.paused:
            return
        self._count("worker stopped and continued")
        seconds = self.draw.choice((1.0, 20.0, 90.0)) * self.draw.random()
        self.kernel.note(f"{worker.student}: SIGSTOP for {seconds:.1f} s")
        worker.process.pause()
        # The pings of a process that is stopped go unanswered.
        stream = worker.stream
        if stream is not None:
            cut = SERVER_KEEPALIVE * (0.75 + 0.25 * self.draw.random())
            self.kernel.after(cut, lambda: stream.server_lost() if worker.process.paused else None)
        self.kernel.after(seconds, worker.process.go_on)

    def _another_worker(self) -> None:
        student = self.draw.choice(self.experiment.names)
        if student not in self.done and len(self._alive(student)) < 3:
            self._count("another process of a student")
            self.start_worker(student)

    def _kill_server(self) -> None:
        if self.server.up:
            silently = self.draw.random() < 0.3
            self._count("server killed" + (" with its machine" if silently else ""))
            self.server.crash(silently=silently)

    def _kill_server_in_the_act(self) -> None:
        if self.server.up and self.server.fuse is None:
            self._count("server killed in the act")
            self.server.fuse = self.draw.randint(1, 12)

    def _terminate_server(self) -> None:
        if self.server.up and not self.server.paused:
            self._count("server asked to end")
            self.server.terminate()

    def _pause_server(self) -> None:
        if not self.server.up or self.server.paused:
            return
        self._count("server stopped and continued")
        seconds = self.draw.choice((1.0, 20.0, 60.0)) * self.draw.random()
        self.kernel.note(f"server: SIGSTOP for {seconds:.1f} s")
        self.server.pause()
        for stream in self.streams:
            cut = CLIENT_KEEPALIVE * (0.75 + 0.25 * self.draw.random())
            self.kernel.after(cut, lambda stream=stream: stream.worker_lost() if self.server.paused else None)
        self.kernel.after(seconds, self.server.go_on)

    def _cut(self, students: tuple[str, ...] | None = None) -> None:
        seconds = self.draw.choice((2.0, 30.0, 150.0)) * self.draw.random()
        for student in students or (self.draw.choice(self.experiment.names),):
            self._count("link cut")
            link = self.links[student]
            self.kernel.note(f"{student}: its link is cut for {seconds:.1f} s")
            link.cut_for(seconds)
            for stream in self.streams:
                if stream.link is link:
                    self._notice_later(stream)

    def _notice_later(self, stream: Stream) -> None:
        draw = self.draw
        self.kernel.after(
            CLIENT_KEEPALIVE * (0.7 + 0.3 * draw.random()), lambda: stream.worker_lost() if stream.link.cut else None
        )
        self.kernel.after(
            SERVER_KEEPALIVE * (0.7 + 0.3 * draw.random()), lambda: stream.server_lost() if stream.link.cut else None
        )

    def _partition(self) -> None:
        count = self.draw.randint(1, len(self.experiment.names))
        self._cut(tuple(self.draw.sample(self.experiment.names, count)))

    def _break_stream(self) -> None:
        standing = [each for each in self.streams if each.worker_open and each.server_open]
        if not standing:
            return
        draw = self.draw
        stream = draw.choice(standing)
        how = draw.choice(("broken", "half-open upwards", "half-open downwards", "dead and unnoticed"))
        self._count(f"stream {how}")
        self.kernel.note(f"session {stream.session_id}: its stream is {how}")
        soon = how == "broken"
        stream.break_(
            draw.random() * (0.5 if soon else CLIENT_KEEPALIVE),
            draw.random() * (0.5 if soon else SERVER_KEEPALIVE),
            up=how != "half-open downwards",
            down=how != "half-open upwards",
        )

    # The end

    def _calm_down(self) -> None:
        self._calm = True
        self.kernel.note("--- no more faults")
        calm = Weather(delay=0.01)
        for name, value in vars(calm).items():
            setattr(self.weather, name, value)
        for link in self.links.values():
            link.heal()
        self.server.fuse = None
        if self.server.paused:
            self.server.go_on()
        if not self.server.up:
            self.server.start()
        for worker in self.workers:
            worker.process.go_on()
        for name in self.experiment.names:
            if not self._alive(name) and name not in self.done:
                self.start_worker(name)

    def _check_progress(self, bound: float) -> None:
        for worker in self.workers:
            worker.check_bound()
        if not self.server.complete:
            standing = ", ".join(f"{each.student} in {each.doing}" for each in self.workers if each.alive)
            raise Violation(
                f"{bound:.0f} s after the last fault the run is not complete: {len(self.ledger.closed)} of {self.rounds} "
                f"rounds; {standing or 'no worker is there'}"
            )

    def _check_end(self) -> None:
        alive = [each for each in self.workers if each.alive]
        if alive:
            raise Violation(f"the run is complete, but {alive[0].student} goes on, in {alive[0].doing}")
        if len(self.ledger.closed) != self.rounds:
            raise Violation(f"the run is complete with {len(self.ledger.closed)} of {self.rounds} rounds")
        for student in self.experiment.names:
            saved = Store(self.disks[student]).load()
            if saved is None or saved[0] != self.rounds:
                raise Violation(f"the run is complete, but what {student} has saved is not the end: {saved}")
            self.ledger.check_final(student, saved[1])


def _brief(value: Any) -> str:
    return (
        " ".join(str(value).split())[:100]
        if not isinstance(value, pb.JoinRequest)
        else f"{value.participant} {value.first_round}"
    )


def simulate(seed: int, plant: Plant | None = None, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run one seed; what it violates is in the outcome."""
    cluster = Cluster(seed, plant or Plant(), trace)
    try:
        return cluster.run()
    except Violation as violation:
        cluster.kernel.note(f"VIOLATION {violation}")
        cluster.outcome.violation = str(violation)
        return cluster.outcome
