"""The resources that an experiment needs of a Ray cluster, and those that it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from codistill.config.experiment import Experiment, ExperimentError, parse
from codistill_deploy.launch.ray.plan import Bundle, amount, bundles, check_devices, shortage


def experiment(*devices: str, threads: int = 1) -> Experiment:
    document: dict[str, Any] = {
        "name": "run",
        "data": {"dataset": "digits"},
        "training": {"epochs": 1, "threads": threads},
        "students": [
            {"name": f"s{number}", "model": "mlp", "training": {"device": device}}
            for number, device in enumerate(devices)
        ],
    }
    return parse(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("devices", "gpus", "given", "expected"),
    [
        (("cpu", "cpu"), 8, None, [0, 0]),
        (("auto", "auto"), 0, None, [0, 0]),
        (("auto", "auto"), 2, None, [1, 1]),
        (("auto", "cpu", "cuda"), 2, None, [1, 0, 1]),
        (("cuda", "cuda"), 0, None, [1, 1]),  # the cluster may grow by them
        (("auto", "auto", "auto"), 2, None, [0.5, 1, 0.5]),
        (("auto",) * 4, 3, None, [0.5, 1, 1, 0.5]),  # with 1/2 each, two GPUs would hold all, and one would idle
        (("auto", "cpu", "auto", "cuda", "auto"), 3, None, [0.5, 0, 1, 1, 0.5]),
        (("auto",) * 7, 3, None, [0.3333, 0.5, 0.5, 0.3333, 0.5, 0.5, 0.3333]),
        (("auto", "auto", "auto"), 1, None, [0.3333, 0.3333, 0.3333]),
        (("auto", "cuda"), 8, 0.25, [0.25, 0.25]),
    ],
)
def test_how_much_of_a_gpu_each_student_gets(
    devices: tuple[str, ...], gpus: float, given: float | None, expected: list[float]
) -> None:
    server, *students = bundles(experiment(*devices), gpus, given)
    assert server == Bundle("the server", 1)
    assert [each.gpus for each in students] == expected
    assert "GPU" not in server.resources


def test_a_student_asks_for_as_many_cpus_as_it_has_threads() -> None:
    _, first, second = bundles(experiment("cpu", "cuda", threads=3), 0)
    assert first == Bundle("student 's0'", 3)
    assert first.resources == {"CPU": 3}
    assert second.resources == {"CPU": 3, "GPU": 1}


def test_a_teacher_is_asked_for_and_refused_as_a_student_is() -> None:
    teacher = {"name": "wise", "model": "mlp", "weights": "wise.safetensors", "training": {"device": "cuda"}}
    taught = {
        **yaml.safe_load(experiment("cpu", "cpu").to_yaml()),
        "distillation": {"method": "kd"},
        "teachers": [teacher],
    }
    asked = bundles(parse(yaml.safe_dump(taught)), 1)
    assert asked[2:] == [Bundle("student 's1'", 1), Bundle("teacher 'wise'", 1, 1.0)]
    teacher["training"] = {"device": "cuda:1"}
    with pytest.raises(ExperimentError, match=r"teachers\.0\.training\.device: 'cuda:1' is one machine's GPU"):
        check_devices(parse(yaml.safe_dump(taught)), "x.yaml")


def test_a_gpu_by_its_number_is_refused() -> None:
    check_devices(experiment("auto", "cpu", "cuda"), "x.yaml")
    with pytest.raises(ExperimentError) as caught:
        check_devices(experiment("cuda:1", "auto", "cuda:0"), "x.yaml")
    assert str(caught.value).splitlines() == [
        f"x.yaml: students.{position}.training.device: '{device}' is one machine's GPU; on Ray each is given one; "
        "allowed: auto, cpu, cuda"
        for position, device in ((0, "cuda:1"), (2, "cuda:0"))
    ]


SERVER, SMALL, LARGE = Bundle("the server", 1), Bundle("student 'a'", 1, 1), Bundle("student 'b'", 4, 1)


@pytest.mark.parametrize(
    ("nodes", "free", "lack"),
    [
        (
            [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}],
            {"CPU": 6.0, "GPU": 1.0},
            (
                "student 'a' needs 1 CPU and 1 GPU, and no node has that left for it; "
                "the cluster has 6 CPUs and 1 GPU on 2 nodes, 6 CPUs and 1 GPU free"
            ),
        ),
        (
            [{"CPU": 2.0, "GPU": 4.0}],
            {"CPU": 2.0, "GPU": 4.0},
            (
                "student 'b' needs 4 CPUs and 1 GPU, and no node has that left for it; "
                "the cluster has 2 CPUs and 4 GPUs on 1 node, 2 CPUs and 4 GPUs free"
            ),
        ),
        (
            [{"CPU": 8.0, "GPU": 2.0}],
            {"CPU": 3.0},
            "others use what it needs: the cluster has 8 CPUs and 2 GPUs on 1 node, 3 CPUs and 0 GPUs free",
        ),
        (
            [],
            {},
            (
                "student 'b' needs 4 CPUs and 1 GPU; student 'a' needs 1 CPU and 1 GPU; the server needs "
                "1 CPU and 0 GPUs, and no node has that left for it; the cluster has 0 CPUs and 0 GPUs on 0 nodes, 0 CPUs and 0 GPUs free"
            ),
        ),
    ],
)
def test_the_lack_in_words(nodes: list[dict[str, float]], free: dict[str, float], lack: str) -> None:
    assert shortage([SERVER, SMALL, LARGE], nodes, free) == lack


def test_the_largest_find_their_places_first() -> None:
    assert shortage([SMALL, LARGE], [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}], {}).startswith("others use")


def test_the_run_s_own_actors_are_not_called_others() -> None:
    nodes, free = [{"CPU": 2.0, "GPU": 1.0}], {"CPU": 0.0}
    assert shortage([SMALL], nodes, free, placed=[SERVER, Bundle("student 'c'", 1, 1)]) == (
        "student 'a' needs 1 CPU and 1 GPU, and no node has that left for it; the cluster has 2 CPUs and 1 GPU on 1 node, "
        "0 CPUs and 0 GPUs free"
    )
    assert shortage([SMALL], nodes, free, placed=[SERVER]).startswith("others use")


def test_amounts_in_words() -> None:
    assert amount({"CPU": 1, "GPU": 0.5, "memory": 3}) == "1 CPU and 0.5 GPUs"
