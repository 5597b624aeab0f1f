"""The manifests in deploy/kubernetes: what the schemas allow, and what goes with the rest of the project."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from codistill import __version__
from codistill.config.experiment import load
from codistill.process.exit_codes import ExitCode
from codistill_deploy.cli.options import DEFAULT_SERVER
from codistill_deploy.supervise.restart_policy import Ending, GiveUp, decide

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
STUDENTS = load(ROOT / "examples" / "digits.yaml").names
VERSION = "1.34"
"""Of Kubernetes; its schemas come with kubernetes-validate. Those of KubeRay do not, so of a RayJob its pods are checked."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def of_kind(name: str, kind: str) -> list[dict[str, Any]]:
    return [each for each in documents(name) if each["kind"] == kind]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every pod template's spec of a document."""
    found: list[dict[str, Any]] = []
    waiting: list[Any] = [document]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, dict):
            if "containers" in each:
                found.append(each)
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return found


def validate(document: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["plain.yaml", "rayjob.yaml"])
def test_the_manifests_fit_the_schemas_of_kubernetes(name: str) -> None:
    for document in documents(name):
        if not document["apiVersion"].startswith("ray.io/"):
            validate(document)
        for spec in pods(document):
            metadata = {"name": "pod"}
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_field_that_there_is_not_is_found() -> None:
    import kubernetes_validate

    (server,) = of_kind("plain.yaml", "Deployment")
    server["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        validate(server)


@pytest.mark.parametrize("name", ["plain.yaml", "rayjob.yaml"])
def test_nobody_is_root_and_images_are_of_this_version(name: str) -> None:
    found = [spec for document in documents(name) for spec in pods(document)]
    assert found
    for spec in found:
        assert spec["securityContext"]["runAsNonRoot"]
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert re.fullmatch(rf"codistill-(server|worker|ray):{re.escape(__version__)}", container["image"])
            volumes = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_there_is_a_job_for_each_student_which_finds_the_server() -> None:
    jobs = of_kind("plain.yaml", "Job")
    (service,) = of_kind("plain.yaml", "Service")
    (server,) = of_kind("plain.yaml", "Deployment")
    listens = server["spec"]["template"]["spec"]["containers"][0]["args"]
    port = DEFAULT_SERVER.rpartition(":")[2]
    assert f"0.0.0.0:{port}" in listens
    assert service["spec"]["selector"].items() <= server["spec"]["template"]["metadata"]["labels"].items()
    assert {each["name"]: each["port"] for each in service["spec"]["ports"]} == {"grpc": int(port), "metrics": 9464}
    arguments = [job["spec"]["template"]["spec"]["containers"][0]["args"] for job in jobs]
    assert tuple(each[each.index("--student") + 1] for each in arguments) == STUDENTS
    for each in arguments:
        assert each[each.index("--server") + 1] == f"{service['metadata']['name']}:{port}"


def test_a_job_is_ended_by_the_codes_that_end_a_worker_elsewhere_too() -> None:
    never = [code for code in ExitCode if isinstance(decide(Ending(code), [], 10), GiveUp)]
    for job in of_kind("plain.yaml", "Job"):
        (rule,) = [each for each in job["spec"]["podFailurePolicy"]["rules"] if each["action"] == "FailJob"]
        assert rule["onExitCodes"]["values"] == never
        assert rule["onExitCodes"]["containerName"] == job["spec"]["template"]["spec"]["containers"][0]["name"]


def test_the_job_on_ray_asks_for_a_cluster_that_holds_its_experiment() -> None:
    (job,) = of_kind("rayjob.yaml", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={cluster['rayVersion']}\n" in pinned
    of_repository = yaml.safe_load((ROOT / "deploy" / "ray" / "runtime_env.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == of_repository
    cpus = sum(each["replicas"] * int(each["rayStartParams"]["num-cpus"]) for each in cluster["workerGroupSpecs"])
    assert cpus >= 1 + len(STUDENTS)
    assert job["spec"]["entrypoint"].split()[:2] == ["codistill", "ray"]


# --- with GPUs, by the command of docs/kubernetes.md


def with_gpus(name: str) -> list[dict[str, Any]]:
    """Return a manifest's documents as the page's command changes them."""
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (sed -e .*) deploy/kubernetes/plain\.yaml \|$", page, flags=re.MULTILINE)
    changed = subprocess.run([*shlex.split(command), FOLDER / name], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(changed.stdout))


def containers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [container for document in found for spec in pods(document) for container in spec["containers"]]


def asks_for_gpus(container: dict[str, Any]) -> int:
    return container["resources"]["limits"].get("nvidia.com/gpu", 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["plain.yaml", "rayjob.yaml"])
def test_only_students_are_given_gpus_and_their_images_have_cuda(name: str) -> None:
    assert not any(map(asks_for_gpus, containers(documents(name)))), "the images for the CPU hold no GPU"
    changed = with_gpus(name)
    for document in changed:
        if not document["apiVersion"].startswith("ray.io/"):
            validate(document)
        for spec in pods(document):
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec})
    asking = [each for each in containers(changed) if asks_for_gpus(each)]
    assert asking
    for container in asking:
        assert re.fullmatch(rf"codistill-(worker|ray):{re.escape(__version__)}-cuda", container["image"])
    if name == "plain.yaml":
        jobs = [each for each in changed if each["kind"] == "Job"]
        assert asking == containers(jobs)
        assert [each["image"] for each in containers(changed) if each not in asking] == [
            f"codistill-server:{__version__}"
        ]
    else:
        cluster = next(each for each in changed if each["kind"] == "RayJob")["spec"]["rayClusterSpec"]
        assert asking == containers(cluster["workerGroupSpecs"])
        assert not any(map(asks_for_gpus, containers([cluster["headGroupSpec"]])))


@pytest.mark.parametrize("name", ["plain.yaml", "rayjob.yaml"])
def test_a_student_may_take_more_memory_than_it_asks_for(name: str) -> None:
    """One on a GPU needs more than the digits do; a limit that they just fit kills its pod."""
    students = [each for each in containers(documents(name)) if "nvidia.com/gpu" not in each["resources"]["limits"]]
    for container in students[1:]:  # the first is the server, or the head
        request, limit = (container["resources"][key]["memory"] for key in ("requests", "limits"))
        assert int(limit.removesuffix("Gi")) >= 4 * int(request.removesuffix("Gi"))
