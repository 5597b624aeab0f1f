"""An experiment, and records of its run."""

from __future__ import annotations

from codistill.config.experiment import Experiment, parse
from codistill.rundir.records import Joined, Measured, ParticipantWait, RoundsClosed


def experiment(epochs: int = 4) -> Experiment:
    return parse(
        f"name: tiny\ndata: {{dataset: digits}}\ntraining: {{epochs: {epochs}}}\n"
        "students: [{name: a, model: mlp}, {name: b, model: cnn}]\n"
    )


def measured(participant: str, at: int, accuracy: float, split: str = "test", time: float = 0.0) -> Measured:
    return Measured.model_validate(
        {
            "time": time,
            "participant": participant,
            "split": split,
            "steps_trained": at,
            "epochs_trained": at / 10,
            "accuracy": accuracy,
            "loss": 1 - accuracy,
        }
    )


def joined(participant: str, device: str = "cpu", time: float = 0.0) -> Joined:
    return Joined(
        time=time,
        participant=participant,
        model=f"model of {participant}",
        parameters=1000,
        device=device,
        total_rounds=20,
        total_steps=40,
    )


def span(first: int, last: int, p50: float = 0.001, longest: float = 0.002, **waits: tuple[int, float]) -> RoundsClosed:
    return RoundsClosed(
        time=float(last),
        first=first,
        last=last,
        steps_trained=2 * (last + 1),
        seconds=1.0,
        wait_p50=p50,
        wait_max=longest,
        waits={name: ParticipantWait(rounds=rounds, seconds=seconds) for name, (rounds, seconds) in waits.items()},
    )
