from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from codistill.config.exchange import Exchange
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.config.participants import Student
from codistill.process import user_code
from codistill.process.exit_codes import ExitCode
from codistill.rundir import info
from codistill.rundir.info import RunInfo
from codistill.rundir.layout import RunLayout
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_server.rounds.events import Samples
from codistill_server.storage.journal import ClosedRound, Journal
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore


@pytest.fixture
def experiment() -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "data": {"dataset": "digits"},
            "training": {"epochs": 1},
            "students": [{"name": "a", "model": "mlp"}, {"name": "b", "model": "cnn"}],
        }
    )


def test_start_writes_the_resolved_experiment_and_where_it_ran(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(experiment, mode="grpc", resume=False)
    assert identity(folder.experiment()) == identity(experiment)
    about = json.loads((folder.path / "run.json").read_text())
    assert about["mode"] == "grpc"
    assert {"codistill", "python", "torch"} <= about["versions"].keys()
    assert folder.student("a").path.is_dir()
    assert folder.student("b").path.is_dir()


@pytest.mark.parametrize("how", ["hold", "join"])
def test_a_new_folder_is_its_users_alone_and_one_that_is_there_keeps_its_mode_with_a_warning(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def use(folder: RunFolder) -> None:
        if how == "join":
            folder.join(experiment)
            return
        with folder.hold():
            pass

    new = RunFolder(tmp_path / "runs" / "new")
    use(new)
    assert stat.S_IMODE(new.path.stat().st_mode) == 0o700
    use(new)
    assert not caplog.messages
    shared = RunFolder(tmp_path / "shared")
    shared.path.mkdir()
    for mode, warned in ((0o2770, False), (0o755, True), (0o777, True)):
        shared.path.chmod(mode)
        use(shared)
        assert stat.S_IMODE(shared.path.stat().st_mode) == mode
        told = [f"folder {shared.path} can be used by other users (mode {mode:03o}); chmod 700 it"] if warned else []
        assert caplog.messages == told
        caplog.clear()


def test_a_folder_that_a_run_uses_is_joined_by_that_runs_own_processes_alone(
    experiment: Experiment, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        folder.start(experiment, mode="grpc", resume=False)
        with pytest.raises(
            CommandError, match=r"run folder .*run is in use by a run, .*; end the run first, or"
        ) as raised:
            folder.join(experiment, ["a"])
        assert raised.value.code is ExitCode.CONFIGURATION
        folder.join(experiment, ["a"], supervised=True)
    folder.join(experiment, ["a"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE])
def test_a_folder_for_which_there_is_no_room_ends_the_command_with_its_own_code(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        CommandError, match=rf"run folder {folder.path} cannot be written: .*{os.strerror(number)}"
    ) as raised:
        folder.start(experiment, mode="grpc", resume=False)
    assert raised.value.code is ExitCode.STORAGE


def add_checkpoint(folder: RunFolder) -> None:
    """Leave what makes a run one to resume."""
    folder.student("a").path.mkdir(parents=True, exist_ok=True)
    (folder.student("a").path / "checkpoint.safetensors").touch()


def test_a_folder_with_a_run_is_not_taken_twice(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    add_checkpoint(folder)
    with pytest.raises(CommandError, match=f"{tmp_path} already holds a run; give --resume"):
        folder.start(experiment, mode="grpc", resume=False)
    folder.start(experiment, mode="grpc", resume=True)


def test_resuming_with_another_experiment_names_the_field_and_both_values(
    experiment: Experiment, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    add_checkpoint(folder)
    with pytest.raises(CommandError, match="experiment field seed: the run has 0, this experiment has 9"):
        folder.start(experiment.replace(seed=9), mode="grpc", resume=True)


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"is not a run folder: it has no experiment\.yaml"):
        RunFolder(tmp_path).experiment()


def test_a_folder_that_cannot_be_written_says_so(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CommandError, match=r"run folder .*file/run cannot be written: Not a directory; make it writable, or give"
    ):
        RunFolder(tmp_path / "file" / "run").start(experiment, mode="grpc", resume=False)


def test_students_may_be_added_later_where_every_round_is_kept(experiment: Experiment, tmp_path: Path) -> None:
    more = (*experiment.students, Student(name="c", model="vit"))
    folder = RunFolder(tmp_path / "needed")
    folder.start(experiment, mode="grpc", resume=False)
    add_checkpoint(folder)
    with pytest.raises(CommandError, match=r"students were added .* exchange\.journal\.keep: all"):
        folder.start(experiment.replace(students=more), mode="grpc", resume=True)

    keeping = experiment.replace(exchange=Exchange.model_validate({"journal": {"keep": "all"}}))
    folder = RunFolder(tmp_path / "all")
    folder.start(keeping, mode="grpc", resume=False)
    add_checkpoint(folder)
    folder.start(keeping.replace(students=more), mode="grpc", resume=True)
    assert folder.experiment().names == ("a", "b", "c")
    assert folder.student("c").path.is_dir()


def test_resuming_where_no_run_is_says_so(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(
        CommandError,
        match="holds no run to continue: there is no such folder; give the --run-dir of one, or leave out --resume",
    ):
        RunFolder(tmp_path / "typo").start(experiment, mode="grpc", resume=True)
    assert not (tmp_path / "typo").exists()


def test_what_is_missing_of_a_run_to_continue_is_named(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    folder.metrics_file.touch()
    folder.experiment_file.unlink()
    named = r"it has no experiment\.yaml, no checkpoint in .*, and no closed round .*; of a run it holds run\.json, metrics\.jsonl;"
    with pytest.raises(CommandError, match=named):
        folder.start(experiment, mode="grpc", resume=True)
    folder.start(experiment, mode="grpc", resume=False)
    folder.start(experiment, mode="grpc", resume=True)
    assert "it has no checkpoint in students/*, and no closed round in its journal" in caplog.text
    assert "begins at its first step" in caplog.text


def add_round(folder: RunFolder, experiment: Experiment) -> None:
    journal = Journal(folder.journal_file, identity(experiment))
    journal.append(ClosedRound(0, Samples(b"", b""), {}))
    journal.close()


def add_real_checkpoint(folder: RunFolder, experiment: Experiment) -> None:
    layout = folder.student("a")
    CheckpointStore(layout.path).save(Checkpoint("a", identity(experiment), 1, {}, {}, {}))


@pytest.mark.parametrize("how", ["start", "join"])
@pytest.mark.parametrize("add", [add_round, add_real_checkpoint])
def test_an_experiment_file_that_is_lost_is_put_back_by_the_right_one_alone(
    add: Callable[[RunFolder, Experiment], None],
    how: str,
    experiment: Experiment,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = RunFolder(tmp_path)

    def begin(given: Experiment) -> None:
        folder.start(given, mode="grpc", resume=True) if how == "start" else folder.join(given, ["a"])

    folder.start(experiment, mode="grpc", resume=False)
    add(folder, experiment)
    folder.experiment_file.unlink()
    assert folder.holds_run
    with pytest.raises(CommandError, match=r"already holds a run, which has lost its experiment\.yaml; give --resume"):
        folder.start(experiment, mode="grpc", resume=False)
    with pytest.raises(CommandError, match="experiment field seed: the run has 0, this experiment has 9"):
        begin(experiment.replace(seed=9))
    assert not folder.experiment_file.exists()
    begin(experiment)
    assert folder.experiment() == experiment
    assert "was missing; it is written again" in caplog.text


def test_a_run_that_nothing_identifies_is_not_taken_for_another(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    add_checkpoint(folder)
    with pytest.raises(CommandError, match="neither its journal nor a checkpoint can be read"):
        folder.start(experiment, mode="grpc", resume=True)


def test_a_run_that_trained_nothing_does_not_stop_the_corrected_one(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    Journal(RunLayout(tmp_path).journal_file, identity(experiment)).close()
    folder.metrics_file.touch()
    folder.start(experiment.replace(seed=9), mode="grpc", resume=False)
    assert folder.experiment().seed == 9
    assert not folder.metrics_file.exists()

    journal = Journal(RunLayout(tmp_path).journal_file, identity(folder.experiment()))  # another's is gone
    journal.append(ClosedRound(0, Samples(b"", b""), {}))
    journal.close()
    with pytest.raises(CommandError, match="already holds a run; give --resume"):
        folder.start(experiment, mode="grpc", resume=False)


def test_a_journal_that_cannot_be_read_is_not_thrown_away(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    RunLayout(tmp_path).journal_file.write_bytes(b"this is no journal" * 100)
    with pytest.raises(CommandError, match="already holds a run"):
        folder.start(experiment, mode="grpc", resume=False)


def test_a_server_at_work_keeps_its_folder(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.join(experiment)
    with (tmp_path / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CommandError, match="experiment field seed: the run has 0, this experiment has 9"):
            folder.join(experiment.replace(seed=9), ["a"])
    folder.join(experiment.replace(seed=9), ["a"])
    assert folder.experiment().seed == 9


def test_servers_and_workers_started_by_hand_make_one_folder_a_runs(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(folder.join, experiment, students) for students in ([], ["a"], ["b"]) for _ in "12"]:
            each.result()
    assert folder.experiment() == experiment
    about = folder.path / "run.json"
    assert json.loads(about.read_text())["mode"] == "grpc"
    written = about.stat().st_mtime_ns
    folder.join(experiment, ["a"])
    assert about.stat().st_mtime_ns == written, "what was started first stands there"


def test_a_process_that_keeps_a_folder_is_waited_for_and_named(experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.join(experiment)
    path = tmp_path / "start.lock"
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = rf"held for 0\.2 s by another server or worker, which holds {path} \(process {os.getpid()} on .*\); .* end it"
        with pytest.raises(CommandError, match=line) as refused:
            folder.join(experiment, seconds=0.2)
        threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        folder.join(experiment)
    assert refused.value.code is ExitCode.ERROR, "it may be over the next time"


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    waits: list[str] = []
    with (
        RunFolder(tmp_path / "run").hold(),
        pytest.raises(CommandError, match="is in use by another run, or by a process of one that was killed"),
        RunFolder(tmp_path / "run").hold(0.2, lambda: waits.append("waiting")),
    ):
        pytest.fail("held twice")
    assert waits == ["waiting"]
    with RunFolder(tmp_path / "run").hold(0):
        pass


def test_a_process_that_inherits_the_hold_keeps_the_folder(tmp_path: Path) -> None:
    """The command is killed; its worker lives on for a while. Nobody may train the same student meanwhile."""
    script = """
        import subprocess, sys
        from pathlib import Path
        from codistill_deploy.run_folder import RunFolder
        with RunFolder(Path(sys.argv[1])).hold() as lock:
            child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], pass_fds=[lock])
            print(child.pid, flush=True)
            child.wait()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        with pytest.raises(CommandError, match="in use"), RunFolder(tmp_path).hold(0.2):
            pytest.fail("the child still holds it")
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()
    with RunFolder(tmp_path).hold(30):
        pass


def test_a_start_that_was_killed_anywhere_can_be_resumed(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of start in turn is the last one that is done."""

    class KilledError(BaseException):
        pass

    steps = 0

    def counted(name: str, real: object) -> None:
        def step(*arguments: object, **named: object) -> object:
            nonlocal steps
            if steps == 0:
                raise KilledError
            steps -= 1
            return real(*arguments, **named)  # pyright: ignore[reportCallIssue]

        monkeypatch.setattr(name, step)

    for last in range(100):
        folder = RunFolder(tmp_path / str(last))
        with monkeypatch.context():
            steps = last
            monkeypatch.setattr(user_code, "digests", dict)  # it reads the tests' modules, and writes nothing
            for name, real in (
                ("pathlib.Path.mkdir", Path.mkdir),
                ("pathlib.Path.open", Path.open),
                ("pathlib.Path.replace", Path.replace),
                ("os.fsync", os.fsync),
            ):
                counted(name, real)
            try:
                folder.start(experiment, mode="grpc", resume=False)
            except KilledError:
                done = False
            else:
                done = True
            steps = 1_000_000
            monkeypatch.undo()
        folder.start(experiment, mode="grpc", resume=folder.experiment_file.exists())
        assert identity(folder.experiment()) == identity(experiment)
        if done:
            assert last > 8
            return
    pytest.fail("start never ends")


def test_resuming_adds_a_start_and_warns_of_what_has_changed(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    first = RunInfo.read(folder.info_file)
    add_checkpoint(folder)
    folder.start(experiment, mode="grpc", resume=True)
    assert not caplog.messages, "nothing has changed"
    monkeypatch.setattr(info, "version", lambda _: "99.1")
    folder.start(experiment, mode="in-process", resume=True)
    known = first.versions["torch"]
    expected = (
        f"torch: the run was last started with {known}, now with 99.1; its numbers may differ from those of a run"
    )
    assert any(message.startswith(expected) for message in caplog.messages)
    read = RunInfo.read(folder.info_file)
    assert (read.versions, read.created, read.mode) == (first.versions, first.created, "grpc")
    assert [each.mode for each in read.resumed] == ["grpc", "in-process"]


def test_a_run_json_that_cannot_be_read_keeps_no_run_from_being_resumed(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.start(experiment, mode="grpc", resume=False)
    add_checkpoint(folder)
    folder.info_file.write_text("{")
    folder.start(experiment, mode="grpc", resume=True)
    assert caplog.messages[0].endswith(
        "Invalid JSON: EOF while parsing an object at line 1 column 1; the facts of this start replace it"
    )
    assert RunInfo.read(folder.info_file).mode == "grpc"
