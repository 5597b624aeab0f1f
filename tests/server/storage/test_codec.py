from __future__ import annotations

import torch

from codistill.methods.aggregator import Targets
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import verify_checksum
from codistill.wire.tensors import decode
from codistill_server.storage.codec import decode_state, encode_replies, encode_state

LOGITS = torch.tensor([[1.0, -2.5], [0.25, 3.0]])


def test_the_state_comes_back_to_the_bit() -> None:
    state = {"errors": torch.rand(3, 3), "weights": torch.tensor([1 / 3])}
    back = decode_state(encode_state(7, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_no_state_is_no_bytes() -> None:
    assert encode_state(7, {}) == b""
    assert decode_state(b"") == {}


def test_participants_without_a_reply_of_their_own_share_one() -> None:
    targets = Targets(shared={"logits": LOGITS}, each={"ant": {"logits": 2 * LOGITS}})
    replies = encode_replies(7, targets, ["old"], "float32")
    assert replies.keys() == {"", "ant", "old"}
    assert all(verify_checksum(reply) for reply in replies.values())
    sent = {participant: pb.ExchangeResponse.FromString(reply).targets for participant, reply in replies.items()}
    assert {message.round for message in sent.values()} == {7}
    assert torch.equal(decode(sent[""].targets["logits"]), LOGITS)
    assert torch.equal(decode(sent["ant"].targets["logits"]), 2 * LOGITS)
    assert not sent["old"].targets, "a teacher learns nothing"
