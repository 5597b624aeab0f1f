from __future__ import annotations

from codistill.methods.aggregator import Output


class TestOutput:
    def test_the_classes_are_exact_and_other_sizes_bounded(self) -> None:
        both = Output((None, 8))
        assert both.accepts([3, 8], 3)
        assert both.accepts([3, 1], 3)
        for dims in ([3, 9], [2, 8], [3, 0], [3], [3, 8, 1]):
            assert not both.accepts(dims, 3)
        assert both.largest(3) == [3, 8]
        assert both.describe(3) == "[3, up to 8]"
