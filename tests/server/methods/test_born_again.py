from __future__ import annotations

from codistill.config.methods import BornAgain
from codistill.methods.aggregator import RoundInputs
from server.methods.support import LABELS, PAIR, B, C, aggregator_of, drawn


def test_a_generation_is_taught_by_its_own() -> None:
    aggregator = aggregator_of(BornAgain(generations=1), ("ant.1", "bee.1"))
    first, second = {"logits": drawn(1, B, C)}, {"logits": drawn(2, B, C)}
    made = aggregator.targets(RoundInputs(PAIR, {}, LABELS, teachers={"ant.1": first, "bee.1": second}))
    assert made.each == {"ant": first, "bee": second}
    made = aggregator.targets(RoundInputs(("ant",), {}, LABELS, teachers={"bee.1": second}, include_missing=True))
    assert made.each == {"ant": {}, "bee": second}, "bee asks later, ant learns from the labels alone"
