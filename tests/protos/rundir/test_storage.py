from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill.rundir import storage
from codistill.rundir.files import write_atomically
from codistill.rundir.storage import FolderGuard, StorageError, describe_disk, detail, explain, outlasts_restarts

LASTING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.EFBIG,
)


def error_of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class TestErrors:
    @pytest.mark.parametrize("number", LASTING)
    def test_a_lack_of_storage_or_files_outlasts_restarts(self, number: int) -> None:
        assert outlasts_restarts(error_of(number))

    @pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EACCES, errno.ENOENT, None])
    def test_nothing_else_does(self, number: int | None) -> None:
        assert not outlasts_restarts(OSError("x") if number is None else error_of(number))

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_what_a_disk_lacks_is_told_with_the_disk_and_its_space(self, number: int, tmp_path: Path) -> None:
        text = explain(error_of(number), tmp_path / "not" / "there.json")
        assert text.startswith(f"{os.strerror(number)} (")
        assert f"mounted at {mount_point(tmp_path)}" in text
        assert text.endswith(" left)")

    def test_a_limit_of_the_process_is_told_with_its_value(self, tmp_path: Path) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        text = explain(error_of(errno.EMFILE), tmp_path)
        assert text == f"Too many open files (this process may have {soft} files open: ulimit -n)"

    def test_another_error_is_told_as_the_system_does(self, tmp_path: Path) -> None:
        assert explain(error_of(errno.EACCES), tmp_path) == "Permission denied"
        assert explain(OSError("it broke"), tmp_path) == "it broke"
        assert detail(error_of(errno.EACCES), tmp_path) == ""

    def test_a_disk_without_inodes_and_a_read_only_one_are_told_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Disk:
            f_bavail, f_blocks, f_frsize, f_files, f_favail, f_flag = 1536, 4096, 1 << 20, 256, 0, os.ST_RDONLY

        monkeypatch.setattr(storage.os, "statvfs", lambda _: Disk)
        assert describe_disk(tmp_path).endswith("has 1.5 GiB of 4.0 GiB left and 0 of 256 inodes and is read-only")

    def test_a_disk_that_does_not_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: object) -> None:
            raise error_of(errno.EIO)

        monkeypatch.setattr(storage.os, "statvfs", fail)
        assert describe_disk(tmp_path).endswith(" does not answer: Input/output error")

    def test_a_write_that_fails_names_its_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: object) -> None:
            raise error_of(errno.ENOSPC)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left") as raised:
            write_atomically(tmp_path / "a.json", "{}")
        assert raised.value.filename == str(tmp_path / "a.json")


def mount_point(path: Path) -> Path:
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_mount())


class TestFolderGuard:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "run"
        (folder / "students").mkdir(parents=True)
        (folder / "journal").write_text("rounds")
        return folder

    @pytest.fixture
    def guard(self, folder: Path) -> FolderGuard:
        return FolderGuard("run folder", folder, "its journal", [folder / "journal", folder / "students"])

    def test_a_folder_that_is_written_to_is_whole(self, guard: FolderGuard, folder: Path) -> None:
        (folder / "journal").write_text("more rounds")
        (folder / "students" / "log.txt").touch()
        write_atomically(folder / "experiment.yaml", "x")
        guard.check()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (shutil.rmtree, "was deleted while the run was going on, and its journal with it; start the run anew"),
            (lambda folder: folder.rename(folder.with_name("b")), "was moved to {parent}/b while the run was going on"),
            (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "was deleted while"),
            (lambda folder: (folder.rename(folder.with_name("b")), folder.mkdir()), "was moved to {parent}/b while"),
            (lambda folder: (shutil.rmtree(folder), folder.touch()), "was deleted while"),
            (lambda folder: folder.parent.rename(folder.parent.with_name("b")), "was moved to "),
            (lambda folder: (folder / "journal").unlink(), "journal was deleted, moved or replaced"),
            (lambda folder: write_atomically(folder / "journal", "another"), "journal was deleted, moved or replaced"),
            (lambda folder: shutil.rmtree(folder / "students"), "students was deleted, moved or replaced"),
        ],
    )
    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, which says where a folder went")
    def test_what_became_of_it_is_told(
        self, guard: FolderGuard, folder: Path, change: Callable[[Path], object], told: str
    ) -> None:
        change(folder)
        with pytest.raises(StorageError) as raised:
            guard.check()
        assert str(raised.value).startswith(f"run folder {folder}")
        assert told.format(parent=folder.parent) in str(raised.value)
        assert raised.value.code is ExitCode.STORAGE

    def test_a_folder_that_can_no_longer_be_written(
        self, guard: FolderGuard, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after its file system was remounted read-only, which `access` tells root too."""
        monkeypatch.setattr(storage.os, "access", lambda path, _: path != folder)
        with pytest.raises(
            StorageError, match=r"can no longer be written \(.*mounted at .*\): from now on its journal"
        ):
            guard.check()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_a_folder_that_lost_its_permission(self, guard: FolderGuard, folder: Path) -> None:
        folder.chmod(0o500)
        with pytest.raises(StorageError, match="can no longer be written"):
            guard.check()

    def test_a_folder_that_cannot_be_reached(
        self, guard: FolderGuard, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: Path, **_: object) -> os.stat_result:
            raise error_of(errno.EIO)

        monkeypatch.setattr(Path, "stat", fail)
        monkeypatch.setattr(storage, "explain", lambda error, _: error.strerror)
        with pytest.raises(StorageError, match=r"can no longer be reached: .*Input/output error"):
            guard.check()

    def test_it_leaves_no_descriptor(self, folder: Path) -> None:
        def held() -> int:
            return sum(1 for _ in Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else 0

        before = held()
        for _ in range(5):
            FolderGuard("run folder", folder, "x").check()
        assert held() == before
