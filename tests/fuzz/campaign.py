"""A fuzzing campaign against a real aggregation server.

One process (:mod:`fuzz.serving`) serves the runs on one event loop.

* ``healthy`` has healthy students who exchange without a pause and compare every target with the pure function, bit for
  bit. What the fuzzer does there is what somebody without a session can do: anything at all below gRPC, and every call
  that is not a legitimate worker's. Two things are left out because the contract wants them to have an effect: a join
  that the run must admit (the newer worker supersedes the older), and a call under a live session's number, which is
  its owner's. The first are passed over as the model says which they are; the second cannot happen, as the run's sessions
  are numbered from far away on, by a journal that remembers such a session.
* ``chaos`` has no healthy students: all its sessions are the fuzzer's, which plays one scenario at a time, and a model says what
  must be answered at each step, targets included. What goes on there must not reach the other runs either.
* ``limited`` has healthy students too, and the limits that every server has by default. It gets floods: more than they
  allow. The other two have generous limits, as one host sends all that they get.

With a token (``--token``) every call of the healthy students carries it, and half of the fuzzer's do not, or a wrong one: those must
be refused for that, whatever else they are, and change nothing.

One thing is not sent: a path that is not UTF-8, nor random bytes where headers may stand, which can unpack to one. It fells
grpc.aio's own loop, and with it the server process, which says so and ends; tests/server/rpc/test_server.py holds it to that.

An input is one attack on a port, one call, one scenario, or one flood. It is drawn from (seed, kind, index) alone, so one
command repeats it: what a failure prints. A scenario also depends on the run's earlier rounds, so its steps are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from grpc_health.v1 import health_pb2

from codistill.config.experiment import Experiment
from codistill_server.admission.contributions import receive_limit
from fuzz.calls import HEALTH, LOST, Answer, Call, SessionlessCaller, WrongError, check, locked_out, make
from fuzz.endpoints import Endpoint
from fuzz.floods import Flooder
from fuzz.healthy_peers import TRAIN_SAMPLES, Student
from fuzz.oracle import OK, Model
from fuzz.scenarios import ScenarioRunner
from fuzz.serving import Serving, Usage
from fuzz.tcp import Port
from server.support import make_experiment

HEALTHY, CHAOS, LIMITED = "healthy", "chaos", "limited"
KINDS: Mapping[str, float] = {"tcp": 0.10, "call": 0.858, "scenario": 0.04, "flood": 0.002}
FAR_AWAY = 2**52
TOGETHER = {"tcp": 4, "call": 12, "scenario": 1, "flood": 1}
LOOK_EVERY = 1000
MORE_RSS = 96 * 2**20  # pools that fill once take about 30 MiB; gRPC keeps some 150 bytes of each stream that is reset
MORE_FDS, MORE_THREADS, MORE_TASKS = 150, 8, 400  # while it goes on, with floods; see also `_settled`
MORE_LOG = 64 * 2**10
MOST_EVENTS = 300  # in the records of `healthy`, where the fuzzer does nothing but be refused
SLOWEST_ROUND = 10.0
TOKEN = "0123456789abcdef" * 2


@dataclass
class Report:
    """The inputs of a campaign, and the answers to them."""

    seed: int
    inputs: Counter[str] = field(default_factory=Counter[str])
    seen: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    skipped: int = 0
    seconds: float = 0.0
    rounds: int = 0
    slowest: float = 0.0
    usage: list[Usage] = field(default_factory=list[Usage])

    def __str__(self) -> str:
        first, last = self.usage[0], self.usage[-1]
        done = sum(self.inputs.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.inputs.items()))
        rate = done / max(self.seconds, 1e-9)
        held = (f"{name} {getattr(first, name)} and {getattr(last, name)}" for name in ("fds", "threads", "tasks"))
        lines = [
            f"seed {self.seed}: {done} inputs ({kinds}; {self.skipped} passed over) in {self.seconds:.0f} s, {rate:.0f}/s",
            f"healthy rounds beside them: {self.rounds}, all exact; the slowest took {1000 * self.slowest:.0f} ms",
            f"server before and after: rss {first.rss >> 20} and {last.rss >> 20} MiB, {', '.join(held)}",
        ]
        by_kind: dict[str, list[str]] = {}
        for (kind, status), count in sorted(self.seen.items()):
            by_kind.setdefault(kind, []).append(f"{count} {status}")
        return "\n".join([*lines, *(f"  {kind}: {', '.join(each)}" for kind, each in by_kind.items())])


class FoundError(AssertionError):
    """The campaign found something; the text says what, and how to see it again."""


class Campaign:
    """A server with healthy students, and what is thrown at it. Use :func:`campaign` to have one."""

    def __init__(self, seed: int, serving: Serving, experiments: Mapping[str, Experiment]) -> None:
        self.report = Report(seed)
        self._seed = seed
        self._serving = serving
        self._students = [
            Student(serving.endpoints[run], experiments[run], name, pause)
            for run, pause in ((HEALTHY, 0.02), (LIMITED, 0.2))
            for name in experiments[run].names
        ]
        self._experiments = experiments
        self._ports = {name: Port(endpoint) for name, endpoint in serving.endpoints.items()}
        self._inject: dict[str, Callable[[random.Random], Awaitable[None]]] = {}

    async def run(self, indices: Mapping[str, Sequence[int]]) -> Report:
        """Go through the inputs of these indices, by kind.

        Raises:
            FoundError: the server did what it must not.
        """
        started, before = time.monotonic(), [student.rounds for student in self._students]
        waiting = {kind: iter(each) for kind, each in indices.items()}
        await self._look()
        workers = [
            asyncio.create_task(self._work(kind, waiting[kind])) for kind in waiting for _ in range(TOGETHER[kind])
        ]
        try:
            for worker in asyncio.as_completed(workers):
                await worker
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            for port in self._ports.values():
                port.close()
        await self._settled()
        await self._look()
        self.report.seconds += time.monotonic() - started
        self.report.rounds += sum(student.rounds for student in self._students) - sum(before)
        self.report.slowest = max(student.slowest for student in self._students)
        return self.report

    async def _work(self, kind: str, indices: Sequence[int] | object) -> None:
        for index in indices:  # pyright: ignore[reportGeneralTypeIssues] - shared by the workers of a kind
            try:
                await self._inject[kind](random.Random(f"{self._seed}/{kind}/{index}"))
            except Exception as error:
                raise FoundError(self._description(kind, index, error)) from error
            self.report.inputs[kind] += 1
            if sum(self.report.inputs.values()) % LOOK_EVERY == 0:
                await self._look()

    def _description(self, kind: str, index: int, error: Exception) -> str:
        lines = [
            f"seed {self._seed}, {kind} {index}: {type(error).__name__}: {error}",
            f"again: PYTHONPATH=tests python -m fuzz.campaign --seed {self._seed} --only {kind}/{index}",
        ]
        if not isinstance(error, WrongError):
            lines += traceback.format_exception(error)
        if kind == "scenario":
            lines += ["steps:", *(f"  {step}" for step in self._scenarios.steps)]
        if self._serving.code is not None:
            lines.append(f"the server has ended with {self._serving.code}")
        return "\n".join([*lines, self._serving.problems_logged()[-3000:]])

    async def _look(self) -> None:
        """Look at the server as a whole, and at the healthy students.

        Raises:
            FoundError: it is not as it must be.
        """
        if self._serving.code is not None:
            raise FoundError(
                f"the server has ended with {self._serving.code}\n{self._serving.problems_logged()[-3000:]}"
            )
        usage = await asyncio.to_thread(self._serving.usage)
        self.report.usage.append(usage)
        problems = [student.problem for student in self._students if student.problem]
        if problems_logged := self._serving.problems_logged():
            problems.append(f"the server's log says:\n{problems_logged[-3000:]}")
        for name, endpoint in self._serving.endpoints.items():
            answer = await self._health(endpoint.stranger)
            check(OK, answer)
            if health_pb2.HealthCheckResponse.FromString(answer.replies[0]).status != 1:
                problems.append(f"{name} is not SERVING")
            students = len(self._experiments[name].names)
            if usage.sessions[name] > students or usage.outboxes[name] > students:
                problems.append(f"{name} has {usage.sessions[name]} sessions, {usage.outboxes[name]} outboxes")
        first = self.report.usage[0]
        for what, have, most in (
            ("rss", usage.rss, first.rss + MORE_RSS),
            ("fds", usage.fds, first.fds + MORE_FDS),
            ("threads", usage.threads, first.threads + MORE_THREADS),
            ("tasks", usage.tasks, first.tasks + MORE_TASKS),
            ("the log", self._serving.log.stat().st_size, MORE_LOG),
            ("the number of events", self._events(), MOST_EVENTS),
        ):
            if have > most:
                problems.append(f"{what} has grown to {have}; allowed: {most}")
        if max(student.slowest for student in self._students) > SLOWEST_ROUND:
            problems.append(f"a healthy round took more than {SLOWEST_ROUND} s")
        if problems:
            raise FoundError(
                f"seed {self._seed}, after {sum(self.report.inputs.values())} inputs: " + "; ".join(problems)
            )

    def _events(self) -> int:
        return (self._serving.folder / HEALTHY / "events.jsonl").read_bytes().count(b"\n")

    async def _health(self, endpoint: Endpoint) -> Answer:
        async with endpoint.channel() as channel:
            return await make(endpoint, channel, Call("health", f"{HEALTH}Check", [b""], OK))

    async def _settled(self) -> None:
        """Wait until the server has let go of every connection but those of the healthy students."""
        most = self.report.usage[0]
        deadline = time.monotonic() + 45
        while time.monotonic() < deadline:
            usage = await asyncio.to_thread(self._serving.usage)
            if usage.fds <= most.fds + 8 and usage.tasks <= most.tasks + 8:
                return
            await asyncio.sleep(0.05)
        raise FoundError(f"seed {self._seed}: not let go of within 45 s: {usage}, before: {most}")

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncGenerator[Campaign]:
        """Start the healthy students, record real traffic in the other run, and open the channels."""
        traffic = await self._record()
        for student in self._students:
            student.start()
        async with contextlib.AsyncExitStack() as stack:
            endpoints = self._serving.endpoints
            channels = [await stack.enter_async_context(endpoints[HEALTHY].channel()) for _ in range(3)]
            healthy = Model(self._experiments[HEALTHY], (bytes(32), TRAIN_SAMPLES))
            healthy.frontier = 2**40  # where exactly it is, a call from outside cannot depend on
            sessionless = SessionlessCaller(healthy, receive_limit(self._experiments[HEALTHY]), traffic)

            async def call(rng: random.Random) -> None:
                endpoint, drawn = endpoints[HEALTHY], sessionless.draw(rng)
                if endpoint.token is not None and rng.random() < 0.5:
                    _, token = endpoint.token.metadata
                    endpoint, drawn = endpoint.stranger, locked_out(rng, drawn, token)
                elif drawn.joins:
                    self.report.skipped += 1
                    return
                answer = await make(endpoint, rng.choice(channels), drawn)
                try:
                    check(drawn.expected, answer)
                except WrongError as error:
                    sent = " ".join(raw.hex() if len(raw) < 3000 else f"{len(raw)} bytes" for raw in drawn.messages)
                    raise WrongError(f"{error}\n{drawn.kind} {drawn.path} {drawn.metadata} {sent}") from error
                self.report.seen[drawn.kind, "lost" if answer.text == LOST else answer.code.name] += 1

            async def tcp(rng: random.Random) -> None:
                name = await self._ports[rng.choice(list(endpoints))].attack(rng)
                self.report.seen[f"tcp: {name}", "still serving"] += 1

            flooder = Flooder(endpoints[LIMITED], self._experiments[LIMITED], self.report.seen)
            self._inject = {"call": call, "tcp": tcp, "scenario": self._scenarios.run, "flood": flooder.flood}
            try:
                await self._progress(3)
                yield self
                await self._progress(3)
            finally:
                for student in self._students:
                    await asyncio.to_thread(student.stop)

    async def _record(self) -> Sequence[tuple[str, bytes]]:
        """Have healthy students train in the run `chaos` for a while, then go."""
        experiment, endpoint = self._experiments[CHAOS], self._serving.endpoints[CHAOS]
        students = [Student(endpoint, experiment, name, pause=0) for name in experiment.names]
        for student in students:
            student.start()
        await self._until(lambda: all(student.rounds >= 45 or student.problem for student in students))
        for student in students:
            await asyncio.to_thread(student.stop)
        traffic = [each for student in students for each in student.traffic]
        model = Model(experiment, (bytes(32), TRAIN_SAMPLES))
        self._scenarios = ScenarioRunner(
            endpoint, model, traffic, self.report.seen, lambda: self._serving.received(CHAOS)
        )
        await self._scenarios.catch_up()
        return traffic

    async def _progress(self, rounds: int) -> None:
        wanted = [student.rounds + rounds for student in self._students]
        await self._until(
            lambda: all(
                student.rounds >= number or student.problem
                for student, number in zip(self._students, wanted, strict=True)
            )
        )
        await self._look()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - threads, whose progress sets no event
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def campaign(folder: Path, seed: int, mutant: str = "", token: str = "") -> AsyncGenerator[Campaign]:
    """A campaign that is ready; `mutant` names a bug of :mod:`fuzz.mutants` for it to find, `token` what its servers ask for."""
    experiments = {
        name: make_experiment(name=name, seed=number, exchange={"give_up_after": 60})
        for number, name in enumerate((HEALTHY, CHAOS, LIMITED))
    }
    documents = {name: yaml.safe_dump(each.model_dump(mode="json")) for name, each in experiments.items()}
    with Serving(folder, documents, {HEALTHY: FAR_AWAY}, {LIMITED}, token, mutant) as serving:
        async with Campaign(seed, serving, experiments).ready() as ready:
            yield ready


def share(inputs: int) -> Mapping[str, Sequence[int]]:
    """Return the indices of so many inputs, each kind's share of them."""
    return {kind: range(round(inputs * part)) for kind, part in KINDS.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes a real aggregation server beside a healthy run.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="KIND/INDEX", help="one input, as a failure prints it")
    parser.add_argument("--mutant", default="", help="a bug of fuzz.mutants to look for")
    parser.add_argument("--token", action="store_true", help="have the server ask for a token")
    options = parser.parse_args()
    if options.only:
        kind, _, index = options.only.partition("/")
        indices: Mapping[str, Sequence[int]] = {kind: [int(index)]}
    else:
        indices = share(options.inputs)

    async def go() -> Report:
        with tempfile.TemporaryDirectory() as folder:
            async with campaign(Path(folder), options.seed, options.mutant, TOKEN * options.token) as ready:
                return await ready.run(indices)

    try:
        print(asyncio.run(go()))
    except FoundError as found:
        print(found, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
