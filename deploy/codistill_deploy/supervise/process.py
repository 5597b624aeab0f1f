"""One process on this machine, from its start to its end: polled, sent signals, killed where it hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codistill.process.exit_codes import ExitCode
from codistill_deploy.supervise.heartbeat import HEARTBEAT_VARIABLE, Heartbeat
from codistill_deploy.supervise.parent_death import PARENT_VARIABLE
from codistill_deploy.supervise.restart_policy import Ending

__all__ = ["Launch", "Process"]

_KILL_SECONDS = 5.0
_INSPECT = "PYTHONINSPECT"  # with it, no process ends with its own exit code
_LOG_TAIL = 65536
_CUT_SHORT = (
    "something in it ended the process, with 0 and before its work was done; os._exit does that: see what calls it"
)
_PIPE_BYTES = 65536  # as many as a pipe holds: old heartbeats must not pass for new ones


@dataclass(frozen=True)
class Launch:
    """How processes are started.

    Attributes:
        environment: their environment.
        parent_pipe: the reading end of the pipe by which they see this process die; see
            :mod:`codistill_deploy.supervise.parent_death`.
        inherited: further descriptors that they inherit.
        working_folder: in which they start; None for this process's.
    """

    environment: Mapping[str, str]
    parent_pipe: int
    inherited: tuple[int, ...] = ()
    working_folder: Path | None = None


class Process:
    """A process from its start to its end.

    Args:
        arguments: its command line.
        log: the file that its output is appended to.
        launch: how it is started.
        hang_after: seconds without a heartbeat after which it is killed; see
            :mod:`codistill_deploy.supervise.heartbeat`.

    Raises:
        OSError: it cannot be started now.
    """

    def __init__(self, arguments: Sequence[str], log: Path, launch: Launch, hang_after: float) -> None:
        self._hang: str | None = None
        self._log_file = log.open("a+b")  # read by this descriptor too, as the file may be deleted meanwhile
        try:
            self._heartbeats, childs_end = os.pipe()
        except BaseException:
            self._log_file.close()
            raise
        try:
            os.set_blocking(self._heartbeats, False)
            self._log_start = os.fstat(self._log_file.fileno()).st_size
            # Its own session keeps the terminal's Ctrl-C from it: only the supervisor sends it signals.
            self._process = subprocess.Popen(
                [*arguments],
                cwd=launch.working_folder,
                stdin=subprocess.DEVNULL,
                stdout=self._log_file,
                stderr=subprocess.STDOUT,
                env={
                    **{name: value for name, value in launch.environment.items() if name != _INSPECT},
                    PARENT_VARIABLE: str(launch.parent_pipe),
                    HEARTBEAT_VARIABLE: str(childs_end),
                    "PYTHONIOENCODING": "utf-8",  # of the log, whatever the terminal's
                },
                pass_fds=(launch.parent_pipe, childs_end, *launch.inherited),
                start_new_session=True,
            )
        except BaseException:
            self._release()
            raise
        finally:
            os.close(childs_end)
        self._heartbeat = Heartbeat(hang_after, time.monotonic())

    @property
    def code(self) -> int | None:
        """The exit code; None while the process runs. Read it again and again: that finds and kills what hangs.

        It is 1 instead of 0 where the process did not come to its own end.
        """
        code = self._process.poll()
        if self._hang is None and not self._log_file.closed:
            hang = self._heartbeat.tick(time.monotonic(), self._read_heartbeats())
            if code is None and hang is not None:
                self._hang = hang
                self._process.kill()
        if code is None or self._hang is None:
            return ExitCode.ERROR if code == ExitCode.OK and self._heartbeat.broke_off else code
        return ExitCode.HUNG

    def ending(self, ran: float) -> Ending:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        code = self.code
        assert code is not None  # noqa: S101 - the caller looked
        cut_short = _CUT_SHORT if code != self._process.returncode else ""
        return Ending(code, self._hang or cut_short or (self._last_error() if code > 0 else ""), ran)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if the process runs."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def close(self) -> None:
        """Kill the process if it runs, even if it is stopped, and close its log."""
        self.send_signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it, on a dead disk perhaps
            self._process.wait(_KILL_SECONDS)
        self._release()

    def _release(self) -> None:
        if not self._log_file.closed:
            self._log_file.close()
            os.close(self._heartbeats)

    def _read_heartbeats(self) -> bytes:
        try:
            return os.read(self._heartbeats, _PIPE_BYTES)
        except BlockingIOError:
            return b""

    def _last_error(self) -> str:
        """Return the last error line that it printed, or its last line; both are near the log's end."""
        try:
            end = os.fstat(self._log_file.fileno()).st_size
            tail = os.pread(self._log_file.fileno(), _LOG_TAIL, max(self._log_start, end - _LOG_TAIL))
            lines = tail.decode(errors="replace").splitlines()
        except OSError as error:
            return f"its log cannot be read: {error.strerror}"
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else (lines[-1].strip() if lines else "it printed nothing")
