"""The command lines of a run's parts: what follows the Python that runs them, wherever that is."""

from __future__ import annotations

from codistill_deploy.run_folder import RunFolder

__all__ = ["serve_arguments", "work_arguments"]

_MODULE = ("-m", "codistill_deploy")


def serve_arguments(folder: RunFolder) -> list[str]:
    """Returns the server's, without its addresses.

    It stays after the run is complete: a worker whose goodbye got no answer says it again, to its successor too.
    """
    return [*_MODULE, "serve", *_run(folder), "--stay"]


def work_arguments(folder: RunFolder, student: str) -> list[str]:
    """Returns a worker's; it finds the server by the folder."""
    return [*_MODULE, "work", *_run(folder), "--student", student]


def _run(folder: RunFolder) -> list[str]:
    return [str(folder.experiment_file), "--run-dir", str(folder.path)]
