from __future__ import annotations

from pathlib import Path

from codistill.rundir import history
from codistill.rundir.follower import Follower
from protos.rundir.support import experiment, joined, measured, span


def test_a_history_that_is_followed_is_the_one_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(experiment().to_yaml())
    follower = Follower(experiment(), tmp_path)
    assert follower.advance().participants[0].test == ()
    lines = [
        joined("a"),
        measured("a", 10, 0.5),
        span(0, 9, a=(3, 0.5)),
        measured("a", 20, 0.7),
        measured("a", 10, 0.6),
    ]
    for line in lines:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(line.model_dump_json() + "\n")
        assert follower.version != follower.written
        assert follower.advance() == history.read(tmp_path)
        assert follower.version == follower.written
    assert follower.advance().participants[0].test_count == 2
