from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

import pytest
import yaml

from codistill.config.experiment import Experiment, parse
from codistill.process.exit_codes import ExitCode
from codistill.rundir.files import locked
from codistill_deploy import run_folder
from codistill_deploy.cli import app
from codistill_deploy.cli.console_run import Wire, run_here, run_in_folder
from codistill_deploy.console.progress import ProgressView
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

MEASURED = '{"kind":"measured","time":1,"participant":"mlp","split":"test","steps_trained":3,"epochs_trained":1.0,"accuracy":0.5,"loss":1.0}\n'


class TestReport:
    """The report of a run says how the run ended; it never decides that."""

    @pytest.fixture
    def experiment(self, tmp_path: Path) -> Experiment:
        students = [{"name": "mlp", "model": "mlp"}]
        document = {"name": "x", "data": {"dataset": "digits"}, "training": {"epochs": 1}, "students": students}
        document["distillation"] = {"method": "independent"}
        return parse(yaml.safe_dump(document))

    def end(
        self,
        experiment: Experiment,
        folder: RunFolder,
        error: Exception | None = None,
        metrics: str = "",
        code: ExitCode = ExitCode.OK,
    ) -> ExitCode:
        def run(view: ProgressView, lock: int) -> ExitCode:
            folder.metrics_file.write_text(metrics)
            if error is not None:
                raise error
            return code

        return run_in_folder(experiment, folder, "x", run, mode="grpc", resume=False, report=True)

    def test_of_a_run_that_failed_too(
        self, experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = RunFolder(tmp_path)
        with pytest.raises(CommandError, match="it died") as raised:
            self.end(experiment, folder, CommandError("it died"), MEASURED)
        assert folder.report_file.is_file()
        assert raised.value.__notes__ == [f"report: {folder.report_file}"]
        assert "report" not in capsys.readouterr().out, "it is shown after the error"
        assert app._print_error(raised.value) is ExitCode.CONFIGURATION
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == (f"report: {folder.report_file}\n", "error: it died\n")

    @pytest.mark.parametrize("code", [ExitCode.INTERRUPTED, None])
    def test_of_a_run_that_measured_nothing_there_is_none(
        self, experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: ExitCode | None
    ) -> None:
        folder = RunFolder(tmp_path)
        joined = '{"kind":"joined","time":1,"participant":"mlp","model":"mlp","parameters":1,"device":"cpu","total_rounds":9,"total_steps":9}\n'
        if code is None:
            with pytest.raises(CommandError, match="it died") as raised:
                self.end(experiment, folder, CommandError("it died"), joined)
            assert not hasattr(raised.value, "__notes__")
        else:
            self.end(experiment, folder, None, joined, code)
        assert not folder.report_file.exists()
        assert "report" not in capsys.readouterr().out

    @pytest.mark.parametrize("garbage", [True, False])
    def test_one_that_cannot_be_written_hides_no_error(
        self, experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture, garbage: bool
    ) -> None:
        folder = RunFolder(tmp_path)
        if not garbage:
            folder.report_file.mkdir()
        with pytest.raises(CommandError, match=r"^it died$") as raised:
            self.end(
                experiment, folder, CommandError("it died", ExitCode.HUNG), "garbage\n{}\n" if garbage else MEASURED
            )
        assert raised.value.code is ExitCode.HUNG
        (line,) = caplog.messages
        assert line.startswith(f"{tmp_path}: no report can be made: ")
        assert line.endswith(f"codistill report {tmp_path}")

    def test_a_complete_run_without_one_is_complete(
        self, experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = RunFolder(tmp_path)
        folder.report_file.mkdir()
        assert self.end(experiment, folder) is ExitCode.OK
        (line,) = caplog.messages
        assert "no report can be made" in line

    @pytest.mark.parametrize("why", ["in use by another run", "already holds a run"])
    def test_a_refused_command_leaves_the_folders_own(
        self, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
    ) -> None:
        folder = RunFolder(tmp_path)
        folder.start(experiment, mode="grpc", resume=False)
        folder.metrics_file.write_text("")
        folder.report_file.write_text("the run's own")
        (folder.student("mlp").path / "checkpoint.safetensors").write_bytes(b"")
        with contextlib.ExitStack() as stack:
            if why.startswith("in use"):
                stack.enter_context(folder.hold())
                monkeypatch.setattr(run_folder, "locked", lambda path, _, waiting: locked(path, 0, waiting))
            with pytest.raises(CommandError, match=why):
                self.end(experiment, folder)
        assert folder.report_file.read_text() == "the run's own"


@pytest.mark.parametrize("title", ["x", "x, generation 2 of 3"])
def test_one_of_several_runs_in_a_process_is_told_from_the_others(
    title: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = {
        "name": "x",
        "data": {"dataset": "digits", "train_size": 20, "test_size": 20},
        "training": {"epochs": 1, "batch_size": 10, "device": "cpu"},
        "distillation": {"method": "independent"},
        "students": [{"name": "mlp", "model": "mlp"}],
    }
    source, stop = tmp_path / "x.yaml", threading.Event()
    run = RunFolder(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        code = run_here(
            parse(yaml.safe_dump(document)), run, title, source, stop, resume=False, in_process=True, wire=Wire()
        )
    assert code is ExitCode.OK
    assert [line for line in caplog.messages if "joined run" in line]
    assert all(line.startswith(f"{title}: ") == (title != "x") for line in caplog.messages)
    caplog.clear()
    logging.getLogger("codistill").warning("after it %s", "100 %")
    assert caplog.messages == ["after it 100 %"]
