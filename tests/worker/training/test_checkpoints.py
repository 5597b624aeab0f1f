"""Checkpoints: to the bit, whole or not at all, and never unpickled."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.rundir.storage import StorageError
from codistill_worker.errors import ConfigurationError
from codistill_worker.training import checkpoints
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore, read

NEWEST, PREVIOUS, BEST = "checkpoint.safetensors", "checkpoint.previous.safetensors", "best.safetensors"
IDENTITY = '{"name":"tiny","seed":3}'


def checkpoint(number: int = 1, **changes: Any) -> Checkpoint:
    weights = torch.arange(40, dtype=torch.float32) + number
    made = Checkpoint(
        student="cnn",
        identity=IDENTITY,
        step=number,
        model={"layer.weight": weights.view(5, 8), "layer.count": torch.tensor(number)},
        optimizer={"state": {0: {"momentum_buffer": weights.view(5, 8) / 3}}, "param_groups": [{"lr": 0.1}]},
        progress={"best": 0.5},
    )
    return replace(made, **changes)


def store_with(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder)
    for number in steps:
        store.save(checkpoint(number))
    return store


def load(folder: Path) -> Checkpoint | None:
    return CheckpointStore(folder).load("cnn", IDENTITY)


# --- round trip


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_models_and_optimisers_come_back_to_the_bit(
    name: str,
    tmp_path: Path,
    tiny: Callable[..., Experiment],
    student: Any,
    train: Any,
    state: Any,
    same: Any,
) -> None:
    """SGD's momentum with its None, AdamW's moments and step tensors, batch statistics, counters; and what follows."""
    experiment = tiny()
    trainer = student(experiment, name)
    for steps in (0, 4):
        train(trainer, steps)
        before = state(trainer)
        store = CheckpointStore(tmp_path / str(steps))
        progress = {"best": 0.1 + 0.2, "sums": {"correct": 3, "distillation": None}}
        store.save(
            Checkpoint(
                name, identity(experiment), steps, trainer.model.state_dict(), trainer.optimizer_state(), progress
            )
        )
        loaded = CheckpointStore(tmp_path / str(steps)).load(name, identity(experiment))
        assert loaded is not None
        assert (loaded.student, loaded.step, loaded.progress) == (name, steps, progress)
        assert loaded.identity == identity(experiment)
        assert same(dict(loaded.model), before["model"])
        assert same(loaded.optimizer, before["optimizer"])
        resumed = student(experiment, name)
        resumed.restore(loaded.step, loaded.model, loaded.optimizer)
        assert same(state(resumed), before)
    train(trainer, 3)
    train(resumed, 3)
    assert same(state(resumed), state(trainer))


class Copies(TorchDispatchMode):
    """Counts the copies of tensors, and lists the devices on which memory was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.devices: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.count += name in ("clone", "copy_", "_to_copy", "contiguous")
        if name not in ("detach", "alias", "view", "t") and isinstance(made, torch.Tensor):
            self.devices.append(made.device.type)
        return made


LAYOUTS = {
    "contiguous": lambda value: value,
    "channels last": lambda value: value.to(memory_format=torch.channels_last),
    "transposed": lambda value: value.transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_one_copy_of_each_tensor(layout: str) -> None:
    with torch.device("cpu"):
        model = {name: LAYOUTS[layout](torch.randn(4, 3, 5, 5)) for name in ("first", "second")}
        state = {0: {"momentum_buffer": LAYOUTS[layout](torch.randn(4, 3, 5, 5))}}
    with Copies() as copies:
        content = checkpoints.serialize(checkpoint(model=model, optimizer={"state": state}))
    assert copies.count == 3
    tensors = load_tensors(content)
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in model.items())
    assert torch.equal(tensors["optimizer.state.0.momentum_buffer"], state[0]["momentum_buffer"])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_copy_takes_no_memory_of_the_device(layout: str) -> None:
    """No GPU is there; PyTorch follows the operations on tensors without content."""
    with FakeTensorMode():
        value = LAYOUTS[layout](torch.empty(4, 3, 5, 5, device="cuda"))
        with Copies() as copies:
            copied = checkpoints._on_host(value)
    assert copied.device.type == "cpu"
    assert copied.is_contiguous()
    assert copies.devices
    assert "cuda" not in copies.devices


def test_every_shape_dtype_and_value_comes_back(tmp_path: Path, same: Any) -> None:
    shared = torch.randn(3, 4)
    model = {
        "a": shared,
        "b": shared,  # tied weights
        "c": shared.t(),  # not contiguous
        "d": torch.tensor(True),
        "e": torch.zeros(0, 3),
        "f": torch.tensor([float("nan"), float("inf"), -0.0]).bfloat16(),
        "g": torch.arange(5, dtype=torch.uint8)[::2],
        "h.nested.name": torch.tensor(2**60),
        "optimizer": torch.ones(1),
    }
    optimizer = {
        "state": {0: {"momentum_buffer": None, "step": torch.tensor(3.0)}, 7: {}},
        "param_groups": [{"betas": (0.9, 0.999), "lr": 0.1, "nesterov": False, "params": [0, 7], "name": "ü"}],
    }
    CheckpointStore(tmp_path).save(checkpoint(model=model, optimizer=optimizer))
    loaded = load(tmp_path)
    assert loaded is not None
    finite = {name: value for name, value in model.items() if name != "f"}
    assert same({name: loaded.model[name] for name in finite}, finite)
    assert loaded.model.keys() == model.keys()
    assert torch.equal(loaded.model["f"].view(torch.int16), model["f"].view(torch.int16))
    assert same(loaded.optimizer, optimizer)
    assert list(loaded.optimizer["state"]) == [0, 7], "numbers stay numbers"


def test_what_is_loaded_does_not_lie_in_the_file(tmp_path: Path) -> None:
    store_with(tmp_path, 1)
    loaded = load(tmp_path)
    assert loaded is not None
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert NEWEST not in maps.read_text()
    with (tmp_path / NEWEST).open("r+b") as file:
        file.truncate(0)
    assert loaded.model["layer.weight"].sum() == sum(range(1, 41))


def test_nothing_saved_is_no_error(tmp_path: Path) -> None:
    assert load(tmp_path / "nowhere") is None
    assert CheckpointStore(tmp_path).load_best() is None


# --- the newest two


def test_the_newest_two_are_kept_and_nothing_else(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2, 3)
    assert sorted(each.name for each in tmp_path.iterdir()) == [PREVIOUS, NEWEST]
    assert (read(tmp_path / NEWEST).step, read(tmp_path / PREVIOUS).step) == (3, 2)


def test_the_durable_step_is_that_of_the_older_of_the_two(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.durable_step == 0
    for saved, durable in ((4, 0), (7, 4), (7, 4), (9, 7)):
        store.save(checkpoint(saved))
        assert store.durable_step == durable, f"after {saved}"
    again = CheckpointStore(tmp_path)
    again.load("cnn", IDENTITY)
    assert again.durable_step == 7
    (tmp_path / PREVIOUS).unlink()
    alone = CheckpointStore(tmp_path)
    alone.load("cnn", IDENTITY)
    assert alone.durable_step == 0, "were the only one torn, all would be needed"


def test_best_weights_are_apart(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    store.save_best(checkpoint(5, optimizer={}))
    best, newest = store.load_best(), load(tmp_path)
    assert best is not None
    assert newest is not None
    assert (best.step, newest.step, best.optimizer) == (5, 1, {})
    (tmp_path / BEST).write_bytes(b"torn")
    with pytest.raises(ConfigurationError, match=rf"{BEST} cannot be read"):
        store.load_best()


# --- torn files


def test_a_torn_checkpoint_gives_way_to_the_one_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_with(tmp_path, 1, 2)
    whole = (tmp_path / NEWEST).read_bytes()
    for length in range(len(whole)):
        (tmp_path / NEWEST).write_bytes(whole[:length])
        caplog.clear()
        store = CheckpointStore(tmp_path)
        loaded = store.load("cnn", IDENTITY)
        assert loaded is not None
        assert loaded.step == 1, f"cut to {length} of {len(whole)} bytes"
        assert store.durable_step == 0
        (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert str(tmp_path / NEWEST) in line.getMessage()
        assert "step 1" in line.getMessage()


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    """safetensors itself would load most of these: as another weight, or another step."""
    store_with(tmp_path, 1, 2)
    whole = (tmp_path / NEWEST).read_bytes()
    loadable = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / NEWEST).write_bytes(damaged)
        loaded = load(tmp_path)
        assert loaded is not None
        # Padding in safetensors' header holds nothing; a flipped bit there may leave all that is said as it was.
        assert loaded.step == 1 or same(loaded, checkpoint(2)), f"byte {position} of {len(whole)}"
        with contextlib.suppress(Exception):  # whatever a damaged header leads to
            load_file(tmp_path / NEWEST)
            loadable += 1
    assert loadable > len(whole) // 4, "else the digest would not be needed"


def same(left: Checkpoint, right: Checkpoint) -> bool:
    """Return whether two checkpoints of this module's say the same."""
    about = ("student", "identity", "step", "progress")
    return all(getattr(left, each) == getattr(right, each) for each in about) and str(left) == str(right)


def test_zeros_in_the_place_of_the_end_or_the_start_are_noticed(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2)
    whole = (tmp_path / NEWEST).read_bytes()
    for spoiled in (b"", bytes(len(whole)), bytes(64) + whole[64:], whole + b"more", os.urandom(500)):
        (tmp_path / NEWEST).write_bytes(spoiled)
        loaded = load(tmp_path)
        assert loaded is not None
        assert loaded.step == 1


def test_a_torn_checkpoint_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    """The next save must not push the good one out: were it torn too, nothing would be left."""
    store_with(tmp_path, 1, 2)
    (tmp_path / NEWEST).write_bytes(b"torn")
    store = CheckpointStore(tmp_path)
    assert store.load("cnn", IDENTITY) is not None
    store.save(checkpoint(3))
    assert (read(tmp_path / NEWEST).step, read(tmp_path / PREVIOUS).step) == (3, 1)
    assert store.durable_step == 1
    store.save(checkpoint(4))
    assert (read(tmp_path / NEWEST).step, read(tmp_path / PREVIOUS).step) == (4, 3)


def test_a_damaged_checkpoint_of_a_later_step_is_replaced(tmp_path: Path) -> None:
    """Its header may still be read, and names the step; were that taken for a newer worker's, nothing would be saved."""
    store_with(tmp_path, 3, 7)
    whole = (tmp_path / NEWEST).read_bytes()
    cuts = [whole[:length] for length in (0, 8, len(whole) // 2, len(whole) - 1)]
    for spoiled in (*cuts, whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / NEWEST).write_bytes(spoiled)
        store = CheckpointStore(tmp_path)
        loaded = store.load("cnn", IDENTITY)
        assert loaded is not None
        assert loaded.step == 3
        store.save(checkpoint(4))
        assert [read(tmp_path / name).step for name in (PREVIOUS, NEWEST)] == [3, 4]


def test_an_older_worker_does_not_take_a_later_checkpoints_place(tmp_path: Path) -> None:
    """Its rounds may be forgotten by now; the student would be refused whenever it comes back."""
    older, newer = store_with(tmp_path, 2, 3), CheckpointStore(tmp_path)
    assert newer.load("cnn", IDENTITY) is not None
    for number in (6, 7):
        newer.save(checkpoint(number))
    with pytest.raises(OSError, match="a newer worker has saved step 7 there"):
        older.save(checkpoint(4))
    assert [read(tmp_path / name).step for name in (PREVIOUS, NEWEST)] == [6, 7]
    assert older.durable_step == 2
    older.save(checkpoint(7))  # the same student's same step is the same checkpoint


def test_two_torn_checkpoints_are_explained(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2)
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path)
    for text in (str(tmp_path / NEWEST), str(tmp_path / PREVIOUS), f"remove {tmp_path} to start from the beginning"):
        assert text in str(refused.value)


# --- files of others


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_nothing_is_unpickled(writer: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for name in (NEWEST, PREVIOUS):
        if writer == "pickle":
            (tmp_path / name).write_bytes(pickle.dumps(Malicious(trap)))
        else:
            torch.save({"model": Malicious(trap)}, tmp_path / name)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(tmp_path)
    assert not trap.exists()
    with (tmp_path / NEWEST).open("rb") as file:  # else the trap proves nothing
        if writer == "pickle":
            pickle.load(file)  # noqa: S301 - the trap is this test's own
        else:
            torch.load(file, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"other": "{}"},
        {"codistill": "[]"},
        {"codistill": "{}"},
        {"codistill": "7"},
        {"codistill": '{"format": 3}'},
        {
            "codistill": json.dumps(
                {"format": 3, "student": "cnn", "identity": "", "step": 1, "optimizer": 5, "progress": {}}
            )
        },
        {
            "codistill": json.dumps(
                {
                    "format": 3,
                    "student": "cnn",
                    "identity": "",
                    "step": 1,
                    "optimizer": {"tensor": "no"},
                    "progress": {},
                }
            )
        },
    ],
)
def test_safetensors_of_others_are_refused(header: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    if header is not None and "codistill" in header:
        header |= {"digest": checkpoints._digest(header["codistill"], tensors)}
    save_file(tensors, tmp_path / NEWEST, header)
    with pytest.raises(ConfigurationError, match="was not written by codistill; remove"):
        load(tmp_path)


def test_headers_that_are_no_json(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / NEWEST, {"codistill": "{"})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("number", [2, 99])
def test_other_formats_are_refused_with_a_next_step(number: int, tmp_path: Path) -> None:
    """Whatever else is in them: only their own version knows."""
    for name in (NEWEST, PREVIOUS):
        save_file({"a": torch.zeros(2)}, tmp_path / name, {"codistill": json.dumps({"format": number})})
    fact = f"checkpoint {tmp_path / NEWEST} has format {number}; this version reads 3"
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path)
    assert str(refused.value) == f"{fact}; finish the run with the version that began it, or choose another run folder"
    with pytest.raises(ConfigurationError) as refused:
        read(tmp_path / NEWEST)
    assert str(refused.value) == f"{fact}; use the version that wrote it"


def test_a_newest_of_another_format_gives_way_to_a_readable_one_before_it(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2)
    save_file({"a": torch.zeros(2)}, tmp_path / NEWEST, {"codistill": '{"format": 99}'})
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


def test_another_student_or_experiment_is_refused_with_both_values(tmp_path: Path) -> None:
    store_with(tmp_path, 1)
    with pytest.raises(ConfigurationError, match="student 'cnn', not 'vit'; choose another run folder") as refused:
        CheckpointStore(tmp_path).load("vit", IDENTITY)
    assert str(tmp_path / NEWEST) in str(refused.value)
    for theirs, line in (
        ('{"name":"tiny","seed":4}', "experiment field seed: it has 3, this run has 4; choose another run folder"),
        ('{"name":"a worker","seed":3}', 'experiment field name: it has "tiny", this run has "a worker"'),
    ):
        with pytest.raises(ConfigurationError) as differs:
            CheckpointStore(tmp_path).load("cnn", theirs)
        assert line in str(differs.value)


# --- interrupted and impossible writing

SAVING = """
import sys, itertools, torch
from pathlib import Path
from codistill_worker.training import checkpoints
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
store.load("cnn", sys.argv[2])
for number in itertools.count(1):
    value = torch.full((200_000,), float(number))
    store.save(Checkpoint("cnn", sys.argv[2], number, {"value": value}, {"state": {0: {"m": value}}}, {"best": 0.0}))
    if number == 3:
        print("saving", flush=True)
"""


def test_killed_while_saving_it_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The process is killed wherever it is; what it leaves must load, and hold one step's tensors only."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path), IDENTITY], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "saving\n"
        seen: set[int] = set()
        deadline = time.monotonic() + 20
        for pause in range(12):
            # Stopped rather than killed, it leaves on the disk what a kill at that instant would leave.
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            copy = tmp_path / f"copy-{pause}"
            copy.mkdir()
            for each in tmp_path.glob("checkpoint.*"):
                (copy / each.name).write_bytes(each.read_bytes())
            process.send_signal(signal.SIGCONT)
            loaded = load(copy)
            assert loaded is not None
            assert loaded.step >= 2
            assert bool((loaded.model["value"] == loaded.step).all())
            assert bool((loaded.optimizer["state"][0]["m"] == loaded.step).all())
            seen.add(loaded.step)
            newest = loaded.step
            while (again := load(tmp_path)) is not None and again.step == newest and time.monotonic() < deadline:
                time.sleep(0.001 * pause)
        assert len(seen) > 3, "it was going on"
    finally:
        process.kill()
        process.communicate()
    loaded = load(tmp_path)
    assert loaded is not None
    assert bool((loaded.model["value"] == loaded.step).all())
    left = {each.name for each in tmp_path.iterdir() if each.is_file()}
    assert left <= {NEWEST, PREVIOUS}, "whatever a killed process leaves, the next one removes"


def test_two_processes_of_one_student_never_write_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one was stopped while it wrote, and goes on after the newer one has come and saved."""
    older, newer = store_with(tmp_path, 1), CheckpointStore(tmp_path)
    sync, stops = os.fsync, [True]

    def stop(descriptor: int) -> None:
        if stops:
            stops.pop()
            assert newer.load("cnn", IDENTITY) is not None, "it leaves what another is writing"
            newer.save(checkpoint(2))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        older.save(checkpoint(2))
    assert not stops, "it was stopped"
    for name in (NEWEST, PREVIOUS):
        assert read(tmp_path / name).step == 2
    assert {each.name for each in tmp_path.iterdir()} == {NEWEST, PREVIOUS}


def test_what_a_dead_process_left_half_written_is_removed(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2)
    for name in (f"{NEWEST}.0f0f0f0f.part", f"{BEST}.1a1a1a1a.part"):
        (tmp_path / name).write_bytes(b"half")
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    assert {each.name for each in tmp_path.iterdir()} == {NEWEST, PREVIOUS}


FULL = """
import resource, sys
from pathlib import Path
import torch
from codistill_worker.training import checkpoints
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
loaded = store.load("cnn", sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for save in (store.save, store.save_best):
    try:
        save(Checkpoint("cnn", sys.argv[2], 9, {"value": torch.zeros(10_000)}, {}, {}))
    except OSError as error:
        print(error.strerror)
print(store.durable_step)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    store.save_best(checkpoint(2))
    before = {name: (tmp_path / name).read_bytes() for name in (NEWEST, PREVIOUS, BEST)}
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), IDENTITY], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["File too large", "File too large", "1"]
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before, "nothing half written is left"
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        CheckpointStore(tmp_path / "file" / "cnn").save(checkpoint())


@pytest.mark.parametrize("save", [CheckpointStore.save, CheckpointStore.save_best])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_is_gone_is_an_error_and_is_not_made_again(
    tmp_path: Path, save: Callable[[CheckpointStore, Checkpoint], None], replaced: bool
) -> None:
    folder = tmp_path / "cnn"
    store = store_with(folder, 1)
    folder.rename(tmp_path / "elsewhere")
    if replaced:
        folder.mkdir()
    with pytest.raises(StorageError, match=rf"folder {folder} was .*the checkpoints of student 'cnn'"):
        save(store, checkpoint(2))
    assert folder.exists() == replaced
    assert not replaced or list(folder.iterdir()) == []
    assert read(tmp_path / "elsewhere" / NEWEST).step == 1


def test_students_added_to_the_experiment_later_are_nothing_to_a_checkpoint(tmp_path: Path) -> None:
    older, newer = '{"seed":0,"students":["a","b"]}', '{"seed":0,"students":["a","b","c"]}'
    CheckpointStore(tmp_path).save(checkpoint(3, student="a", identity=older))
    found = CheckpointStore(tmp_path).load("a", newer)
    assert found is not None
    assert found.step == 3
