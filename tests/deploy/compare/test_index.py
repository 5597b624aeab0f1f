from __future__ import annotations

from pathlib import Path

import pytest

from codistill_deploy.compare.index import ComparisonIndex, IndexedRun


def test_an_index_reads_back_as_it_was_written(tmp_path: Path) -> None:
    index = ComparisonIndex(
        experiment="digits",
        methods=("independent",),
        seeds=(0,),
        runs=(IndexedRun(method="independent", seed=0, path="independent/seed-0"),),
    )
    assert index.write(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "comparison.json"
    assert ComparisonIndex.read(tmp_path / "new" / "folder") == index


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", ""])
def test_a_path_out_of_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(
        f'{{"experiment": "x", "methods": [], "seeds": [], "runs": [{{"method": "dml", "seed": 0, "path": "{path}"}}]}}'
    )
    with pytest.raises(ValueError, match=r"comparison\.json: runs\.0\.path: .*relative path"):
        ComparisonIndex.read(tmp_path)
