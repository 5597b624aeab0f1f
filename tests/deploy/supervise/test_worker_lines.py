from __future__ import annotations

from pathlib import Path

from codistill_deploy.supervise.worker_lines import WorkerLines


def test_what_every_worker_logs_of_data_and_code_is_returned_once(tmp_path: Path) -> None:
    logs = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "later.txt"]
    logs[0].write_text("10:00:00 INFO data.root: of an earlier start\n")
    logs[1].touch()
    lines = WorkerLines(logs)
    assert lines.new() == []
    for log in logs[:2]:
        with log.open("a") as file:
            file.write(
                "10:00:01 INFO data.root: img/train: 4 images\n10:00:01 INFO student a: epoch 1\nprinted: data.x\n"
            )
            file.write("10:00:01 WARNING module 'own' has changed\n10:00:02 INFO data.ro")
    assert lines.new() == ["data.root: img/train: 4 images", "warning: module 'own' has changed"]
    logs[2].write_text("10:00:03 INFO data.root: img/train: 4 images\n")
    assert lines.new() == []
    with logs[0].open("a") as file:
        file.write("ot: img/test: 2 images\n")
    assert lines.new() == ["data.root: img/test: 2 images"]
