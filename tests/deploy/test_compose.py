"""The compose files and images, without an engine: they say what the command and the example can do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from codistill import __version__
from codistill.config.experiment import load
from codistill_deploy.cli.app import app
from codistill_deploy.cli.options import DEFAULT_SERVER
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def read(name: str) -> dict[str, Any]:
    """Return a compose file with the defaults of its variables filled in."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return yaml.safe_load(_VARIABLE.sub(lambda found: found[2], text))


COMPOSE = read("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXPERIMENT = load(ROOT / "examples" / "digits.yaml")
GPU: dict[str, dict[str, Any]] = read("docker-compose.gpu.yml")["services"]
WITH_GPUS = {name: service | GPU.get(name, {}) for name, service in SERVICES.items()}
LASTING = {name: service for name, service in SERVICES.items() if name != "token"}


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Return what the command makes of its arguments; fail where it would refuse them."""
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    name, *rest = arguments
    sub = command.commands[name]
    return sub.make_context(name, list(rest)).params


def of_codistill() -> dict[str, list[str]]:
    """Return every command line of ours: of services, and of healthchecks."""
    found = {name: SERVICES[name]["command"] for name in ("server", *EXPERIMENT.names)}
    for name, service in SERVICES.items():
        test = service["healthcheck"].get("test", [])
        if test[1:2] == ["codistill"]:
            found[f"{name}'s health"] = test[2:]
    return found


def test_there_is_a_worker_for_each_student_and_nothing_else_unexpected() -> None:
    assert set(SERVICES) == {"token", "server", "prometheus", "grafana", *EXPERIMENT.names}
    for name in EXPERIMENT.names:
        assert parsed(SERVICES[name]["command"])["student"] == name
        assert parsed(SERVICES[name]["healthcheck"]["test"][2:])["student"] == name


@pytest.mark.parametrize(("name", "arguments"), of_codistill().items())
def test_the_command_takes_its_arguments(name: str, arguments: list[str]) -> None:
    given = parsed(arguments)
    if "experiment" in given:
        assert load(ROOT / given["experiment"]) == EXPERIMENT
    if name in EXPERIMENT.names:
        assert given["server"] == f"server:{DEFAULT_SERVER.rpartition(':')[2]}"


def test_the_server_serves_on_and_writes_the_report() -> None:
    given = parsed(SERVICES["server"]["command"])
    assert given["stay"]
    assert given["report"]
    assert not given["insecure"], "the token protects it"
    assert given["listen"].endswith(DEFAULT_SERVER.rpartition(":")[2]), "where its healthcheck asks"
    assert DOCKERFILE.count("EXPOSE 50551 9464") == 1


def test_the_baseline_is_the_same_students_alone() -> None:
    alone = load(ROOT / "examples" / "digits-alone.yaml").model_dump()
    together = EXPERIMENT.model_dump()
    assert {key for key in together if alone[key] != together[key]} == {"name", "distillation"}
    assert alone["distillation"]["method"] == "independent"


def test_images_are_pinned() -> None:
    foreign = [service["image"] for service in SERVICES.values() if service.get("pull_policy") != "never"]
    assert len(foreign) == 2
    bases = [line.split()[1] for line in DOCKERFILE.splitlines() if line.startswith("FROM ") and ":" in line]
    assert len(bases) == 2
    for image in (*foreign, *bases):
        assert re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+[\w.-]*", image), image


@pytest.mark.parametrize(
    ("services", "worker"), [(SERVICES, "worker:{}"), (WITH_GPUS, "worker:{}-cuda")], ids=["no GPU", "GPUs"]
)
def test_an_image_of_ours_is_built_by_one_service_alone_and_never_pulled(
    services: dict[str, dict[str, Any]], worker: str
) -> None:
    own = [each for each in services.values() if each["image"].startswith("codistill-")]
    built = sorted(each["image"] for each in own if "build" in each)
    assert built == [f"codistill-{name.format(__version__)}" for name in ("server:{}", worker)]
    assert {each["image"] for each in own} == set(built)
    assert {each["pull_policy"] for each in own} == {"never"}
    for name in EXPERIMENT.names:
        assert services[name]["image"] == built[1]


@pytest.mark.parametrize("name", LASTING)
def test_every_service_is_checked_restarted_and_has_no_rights_to_spare(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD", "no shell in between"
    assert service["restart"] == f"on-failure:{DEFAULT_RESTARTS}"
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]


def test_who_waits_for_whom() -> None:
    def awaited(name: str) -> dict[str, str]:
        return {other: each["condition"] for other, each in SERVICES[name].get("depends_on", {}).items()}

    assert awaited("server") == {"token": "service_completed_successfully"}
    assert awaited("grafana") == {"prometheus": "service_healthy"}
    for name in EXPERIMENT.names:
        assert awaited(name) == {"server": "service_healthy"}


def test_ports_are_on_loopback_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"server", "prometheus", "grafana"}
    for ports in published.values():
        for port in ports:
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


def test_volumes_are_named_and_what_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if source.startswith("./"):
                assert (ROOT / source).exists()
                assert mode == ["ro"]
            else:
                assert source in COMPOSE["volumes"]
            assert target.startswith("/")
    for name in ("server", *EXPERIMENT.names):
        assert "runs:/codistill/runs" in SERVICES[name]["volumes"]
        assert "token:/codistill/token:ro" in SERVICES[name]["volumes"]
        assert SERVICES[name]["read_only"], "a run whose volume is missing must fail"


def test_each_worker_has_a_gpu_of_its_own() -> None:
    assert set(GPU) == set(EXPERIMENT.names)
    devices = [service["deploy"]["resources"]["reservations"]["devices"] for service in GPU.values()]
    assert len({device["device_ids"][0] for (device,) in devices}) == len(GPU)
    for (device,) in devices:
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert len(device["device_ids"]) == 1


def test_workers_on_gpus_are_built_with_cuda_whatever_the_others_are_built_with() -> None:
    """A `.env` that takes the server's PyTorch from an index of CPU builds must not give the workers one."""
    text = (ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8")
    assert re.findall(r"\$\{(\w+)", text) == ["CUDA_TORCH_INDEX"]
    (build,) = [service["build"] for service in GPU.values() if "build" in service]
    assert build == {"target": "worker-cuda", "args": {"TORCH_INDEX": ""}}, "empty is pip's own index"
    assert {service["image"] for service in GPU.values()} == {f"codistill-worker:{__version__}-cuda"}


def test_the_image_with_cuda_is_refused_a_build_for_the_cpu_and_can_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = DOCKERFILE.partition("FROM runtime AS worker-cuda\n")[2].partition("\nFROM ")[0]
    assert "apt-get install -y --no-install-recommends g++" in target
    assert "COPY --from=worker-packages /opt/codistill /opt/codistill" in target, "with PyTorch's headers"
    assert target.rstrip().endswith("USER 10001:10001")
    (check,) = re.findall(r"^RUN python -c '(.*)'$", target, flags=re.MULTILINE)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match=r"^TORCH_INDEX: .* a build without CUDA; leave TORCH_INDEX empty"):
        exec(check)  # noqa: S102 - the project's own line
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    exec(check)  # noqa: S102


def test_what_a_model_compiles_can_be_written_and_loaded() -> None:
    for name in ("server", *EXPERIMENT.names):
        assert SERVICES[name]["tmpfs"] == ["/tmp:exec"], "Docker's own default is noexec"
        assert SERVICES[name]["environment"]["HOME"] == "/tmp"


@pytest.mark.parametrize("page", ["gpus.md", "kubernetes.md", "ray.md", "docker-compose.md"])
def test_a_page_that_speaks_of_gpus_says_which_images_they_need(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert "--target worker-cuda" in text or "(gpus.md" in text


def test_the_pages_commands_build_the_images_with_cuda() -> None:
    text = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    worker, ray = re.findall(r"^    docker build (.*)$", text, flags=re.MULTILINE)
    assert worker in DOCKERFILE
    assert ray in (ROOT / "deploy" / "ray" / "Dockerfile").read_text(encoding="utf-8")
    for command, name in ((worker, "worker"), (ray, "ray")):
        words = shlex.split(command)
        assert words[words.index("-t") + 1] == f"codistill-{name}:{__version__}-cuda"
    assert "TORCH_INDEX=" in shlex.split(worker), "empty"


def test_processes_run_without_root_and_get_the_signal_themselves() -> None:
    runtime = DOCKERFILE.partition(" AS runtime")[2]
    assert "USER 10001:10001" in runtime
    assert 'ENTRYPOINT ["codistill"]' in runtime
    assert "STOPSIGNAL SIGTERM" in runtime
    for name in ("server", *EXPERIMENT.names):
        assert "entrypoint" not in SERVICES[name]


def test_an_image_has_its_own_sides_packages_and_the_tested_versions() -> None:
    installs = [line for line in DOCKERFILE.splitlines() if " install " in line and "pip" in line]
    assert len(installs) == 3
    assert all("-c constraints.txt" in line for line in installs)
    assert [re.findall(r"'\.\[(\w+)\]'", line) for line in installs] == [[], ["server"], ["worker"]]
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in shlex.split(line)[1:-1]
    }
    kept = {
        line[1:].split("/")[0]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert copied == kept
