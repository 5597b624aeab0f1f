from __future__ import annotations

import torch

from codistill.config.methods import Dcm
from codistill.methods.aggregator import RoundInputs
from codistill_server import ensembles
from server.methods.support import LABELS, PAIR, B, C, aggregator_of, drawn


class TestDcm:
    OUTPUTS = staticmethod(
        lambda count: {name: drawn(seed, count, B, C) for seed, name in enumerate(("logits/stage1", "logits"))}
    )

    def test_each_gets_its_peers_at_its_stage_and_at_the_others(self) -> None:
        aggregator, outputs = aggregator_of(Dcm(stages=1), ()), self.OUTPUTS(2)
        assert set(aggregator.student) == {"logits/stage1", "logits"}
        made = aggregator.targets(RoundInputs(PAIR, outputs, LABELS))
        assert made.each is not None
        assert made.shared is None
        for position, student in enumerate(PAIR):
            peer = 1 - position
            same = [outputs[name][peer].softmax(-1) for name in ("logits/stage1", "logits")]
            torch.testing.assert_close(made.each[student]["same"], torch.stack(same, 1))
            torch.testing.assert_close(made.each[student]["other"], torch.stack(same[::-1], 1))

    def test_who_asks_later_learns_from_all(self) -> None:
        outputs = self.OUTPUTS(2)
        made = aggregator_of(Dcm(stages=1), ()).targets(RoundInputs(PAIR, outputs, LABELS, include_missing=True))
        expected, _ = ensembles.pooled_dense_probabilities(
            torch.stack([outputs["logits/stage1"], outputs["logits"]], 1)
        )
        assert made.shared is not None
        assert torch.equal(made.shared["same"], expected.transpose(0, 1))

    def test_one_alone_has_no_peers(self) -> None:
        made = aggregator_of(Dcm(stages=1), ()).targets(
            RoundInputs(("ant",), self.OUTPUTS(1), LABELS, include_missing=True)
        )
        assert made.each == {"ant": {}}
        assert made.shared is not None
        assert set(made.shared) == {"same", "other"}
