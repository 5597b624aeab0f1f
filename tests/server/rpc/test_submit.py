from __future__ import annotations

import asyncio
import threading

import pytest

from codistill.methods.aggregator import RoundInputs, Targets
from codistill.v1 import distillation_pb2 as pb
from codistill_server import methods
from server.rpc.support import PATIENCE, drive, returning, serving, until
from server.support import make_experiment


class TestHeavyWork:
    @pytest.mark.parametrize("ensemble", ["linear", "min_logit"])
    def test_linear_is_made_beside_the_loop(self, monkeypatch: pytest.MonkeyPatch, ensemble: str) -> None:
        """Its targets are held back: meanwhile the server answers. Lighter ensembles are made on the loop's thread."""
        experiment = make_experiment(distillation={"ensemble": ensemble})
        aggregator = methods.create(experiment.distillation)
        assert aggregator is not None
        release, threads = threading.Event(), list[str]()

        class Held:
            heavy, student, teacher = aggregator.heavy, aggregator.student, aggregator.teacher

            def targets(self, inputs: RoundInputs) -> Targets:
                threads.append(threading.current_thread().name)
                assert release.wait(PATIENCE)
                return aggregator.targets(inputs)

        monkeypatch.setattr(methods, "create", returning(Held()))
        if not aggregator.heavy:
            release.set()

        async def test() -> None:
            async with serving(experiment) as served:
                participants = await served.participants()
                for participant in participants:
                    await participant.send(0)
                if aggregator.heavy:
                    await until(lambda: len(threads) == 1)
                    response = await asyncio.wait_for(served.stub.GetRun(pb.GetRunRequest()), PATIENCE)
                    assert response.run.frontier == 0
                    release.set()
                answers = {await participant.answer() for participant in participants}
                assert len(answers) == 1

        drive(test)
        (thread,) = threads
        assert thread.startswith("codistill-targets") == aggregator.heavy

    def test_a_real_linear_round(self) -> None:
        async def test() -> None:
            async with serving(make_experiment(distillation={"ensemble": "linear"})) as served:
                participants = await served.participants()
                for number in range(3):
                    await asyncio.gather(*(participant.send(number) for participant in participants))
                    assert len({await participant.answer() for participant in participants}) == 1
                assert served.failures == []

        drive(test)
