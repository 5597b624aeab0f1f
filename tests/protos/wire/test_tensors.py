from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codistill.v1 import distillation_pb2 as pb
from codistill.wire import tensors
from codistill.wire.tensors import MAX_DIMENSIONS, TensorError, check, decode, encode, encoded_size

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(DTYPES))


@st.composite
def any_bits(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """A tensor of any bits: NaNs with payloads, infinities, subnormals, both zeros, all integers."""
    dtype, shape = draw(dtypes), draw(shapes)
    size = math.prod(shape) * SIZES[dtype]
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    flat = torch.frombuffer(raw, dtype=DTYPES[dtype]) if size else torch.empty(0, dtype=DTYPES[dtype])
    return dtype, flat.reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(any_bits())
def test_a_tensor_of_the_wires_own_dtype_arrives_bit_for_bit(case: tuple[str, torch.Tensor]) -> None:
    dtype, tensor = case
    message = encode(tensor, dtype)
    check(message, "x", dtype=dtype, shape=tuple(tensor.shape))
    arrived = decode(pb.Tensor.FromString(message.SerializeToString()))
    assert arrived.dtype is DTYPES[dtype]
    assert arrived.shape == tensor.shape
    assert bits(arrived) == bits(tensor)


@given(any_bits())
def test_bytes_are_little_endian_and_row_major(case: tuple[str, torch.Tensor]) -> None:
    dtype, tensor = case
    numbers = tensor.view(torch.int16) if dtype == "bfloat16" else tensor
    assert encode(tensor, dtype).data == numbers.numpy().astype(numbers.numpy().dtype.newbyteorder("<")).tobytes("C")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_big_endian_machine_swaps_on_both_ways(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor([[1.5, -2.0, 3.25], [0.0, 1024.0, -7.0]]).to(DTYPES[dtype])
    native = encode(tensor, dtype).data
    monkeypatch.setattr(tensors, "sys", SimpleNamespace(byteorder="big"))
    message = encode(tensor, dtype)
    elements = [native[at : at + SIZES[dtype]] for at in range(0, len(native), SIZES[dtype])]
    assert message.data == b"".join(element[::-1] for element in elements)
    assert torch.equal(decode(message), tensor)
    assert decode(encode(torch.empty(0, 3, dtype=DTYPES[dtype]), dtype)).shape == (0, 3)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[1:, 1:],
        lambda x: x[:1].expand(5, 6),
        lambda x: x.flip(0),
        lambda x: x.requires_grad_(),
    ],
    ids=["transposed", "strided", "sliced", "expanded", "flipped", "with gradient"],
)
def test_any_memory_layout_may_be_sent(view: object) -> None:
    tensor = view(torch.arange(24, dtype=torch.float32).reshape(4, 6))  # type: ignore[operator]
    arrived = decode(encode(tensor, "float32"))
    assert torch.equal(arrived, tensor.detach())
    assert not arrived.requires_grad
    assert arrived.is_contiguous()


def test_a_scalar_has_an_empty_shape() -> None:
    message = encode(torch.tensor(3, dtype=torch.int64), "int64")
    assert list(message.shape) == []
    assert decode(message).shape == ()
    assert decode(message).item() == 3


def test_what_is_decoded_has_memory_of_its_own() -> None:
    message = encode(torch.ones(3), "float32")
    decode(message).fill_(7)
    assert torch.equal(decode(message), torch.ones(3))


@given(
    source=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]),
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_no_finite_value_becomes_infinite(source: torch.dtype, values: list[float], dtype: str) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).clamp(-1e18, 1e18).to(source)
    wide = torch.tensor(values, dtype=torch.float64)
    for sent in (tensor[tensor.isfinite()], wide):
        arrived = decode(encode(sent, dtype)).double()
        assert arrived.isfinite().all()
        limit = torch.finfo(DTYPES[dtype]).max
        expected = sent.double().clamp(-limit, limit)
        tolerance = torch.finfo(DTYPES[dtype]).eps * expected.abs() + torch.finfo(DTYPES[dtype]).tiny
        assert ((arrived - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
def test_float16_clamps_at_its_largest_number(source: torch.dtype) -> None:
    sent = torch.tensor([1e5, -1e5, 65536.0, 1e38, -1e38, 1.0], dtype=source)
    assert decode(encode(sent, "float16")).tolist() == [65504.0, -65504.0, 65504.0, 65504.0, -65504.0, 1.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_not_finite_is_not_hidden(dtype: str) -> None:
    arrived = decode(encode(torch.tensor([math.inf, -math.inf, math.nan]), dtype))
    assert arrived[:2].tolist() == [math.inf, -math.inf]
    assert arrived[2].isnan()


def test_encoding_names_a_dtype_that_is_not_allowed() -> None:
    with pytest.raises(TensorError) as caught:
        encode(torch.ones(1), "float8")
    assert str(caught.value) == "dtype 'float8' is not allowed; allowed: float32, float16, bfloat16, int64"


def test_encoding_refuses_what_no_one_would_decode() -> None:
    with pytest.raises(TensorError) as caught:
        encode(torch.ones([1] * (MAX_DIMENSIONS + 1)), "float32")
    assert str(caught.value) == "shape: 9 dimensions; allowed are at most 8"
    assert decode(encode(torch.ones([1] * MAX_DIMENSIONS), "float32")).dim() == MAX_DIMENSIONS


HUGE = 2**32 - 1


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (pb.Tensor(shape=[1], data=b"1234"), "x.dtype: none is given; allowed: float32, float16, bfloat16, int64"),
        (
            pb.Tensor(dtype=77, shape=[1], data=b"1234"),  # type: ignore[arg-type]
            "x.dtype: 77 is not allowed; allowed: float32, float16, bfloat16, int64",
        ),
        (
            pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1] * 9, data=b"1234"),
            "x.shape: 9 dimensions; allowed are at most 8",
        ),
        (
            pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 3], data=b"123"),
            "x.data: 3 bytes; float32 of shape [2, 3] takes 24",
        ),
        (pb.Tensor(dtype=pb.DTYPE_INT64, shape=[1], data=b"1" * 9), "x.data: 9 bytes; int64 of shape [1] takes 8"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT16), "x.data: 0 bytes; float16 of shape [] takes 2"),
        (
            pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[HUGE] * 8, data=b"1234"),
            f"x.shape: {[HUGE] * 8} is too large; allowed are at most 2**40 elements",
        ),
        (
            pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**20, 2**10], data=b"1234"),
            "x.data: 4 bytes; float32 of shape [1048576, 1024] takes 4294967296",
        ),
        (
            pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[0, HUGE, HUGE]),
            f"x.shape: [0, {HUGE}, {HUGE}] is too large; allowed are at most 2**40 elements",
        ),
    ],
)
def test_a_message_that_lies_is_refused_before_anything_is_allocated(
    message: pb.Tensor, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    for refuse in (decode, check):
        with pytest.raises(TensorError) as caught:
            refuse(message, "x")
        assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("dtype", "shape", "problem"),
    [
        ("float16", None, "batch.outputs.logits.dtype: float32 is not allowed; this run's experiment asks for float16"),
        (None, (2, 4), "batch.outputs.logits.shape: [2, 3] is not allowed; expected [2, 4]"),
        (None, (None, 4), "batch.outputs.logits.shape: [2, 3] is not allowed; expected [any, 4]"),
        (None, (2,), "batch.outputs.logits.shape: [2, 3] is not allowed; expected [2]"),
        (None, (2, 3, 1), "batch.outputs.logits.shape: [2, 3] is not allowed; expected [2, 3, 1]"),
        (None, (), "batch.outputs.logits.shape: [2, 3] is not allowed; expected []"),
    ],
)
def test_what_the_run_asks_for_is_named(dtype: str | None, shape: tuple[int | None, ...] | None, problem: str) -> None:
    message = encode(torch.zeros(2, 3), "float32")
    with pytest.raises(TensorError) as caught:
        check(message, "batch.outputs.logits", dtype=dtype, shape=shape)
    assert str(caught.value) == problem


@pytest.mark.parametrize(("dtype", "given"), [(0, "none is given"), (77, "77 is not allowed")])
def test_a_dtype_that_is_none_is_refused_by_what_the_run_asks_for(dtype: int, given: str) -> None:
    message = encode(torch.zeros(2, 3), "float32")
    message.dtype = dtype  # type: ignore[assignment]
    for wanted in DTYPES:
        with pytest.raises(TensorError) as caught:
            check(message, "batch.ids", dtype=wanted)
        assert str(caught.value) == f"batch.ids.dtype: {given}; allowed: {wanted}"


def test_any_size_may_be_left_open() -> None:
    message = encode(torch.zeros(2, 3), "float32")
    check(message, "x", dtype="float32", shape=(None, 3))
    check(message, "x", shape=(None, None))
    check(message, "x")


@given(
    dtype=st.integers(-1, 6),
    shape=st.lists(st.integers(0, HUGE), max_size=10),
    data=st.binary(max_size=64),
)
def test_random_messages_are_decoded_or_refused(dtype: int, shape: list[int], data: bytes) -> None:
    message = pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
    try:
        tensor = decode(message)
    except TensorError:
        return
    assert list(tensor.shape) == shape
    assert bits(tensor) == data


@given(shape=st.lists(st.integers(0, 300), max_size=3), dtype=dtypes)
def test_the_size_on_the_wire_is_bounded(shape: list[int], dtype: str) -> None:
    if math.prod(shape) > 2**17:
        shape = shape[:1]
    message = encode(torch.zeros(shape, dtype=DTYPES[dtype]), dtype)
    assert message.ByteSize() <= encoded_size(shape, dtype)
    assert encoded_size(shape, dtype) <= message.ByteSize() + 16 + 6 * len(shape)


def test_logits_as_float16_move_probabilities_by_less_than_a_thousandth() -> None:
    draw = np.random.default_rng(0)
    for classes in (2, 10, 100):
        logits = torch.from_numpy(draw.uniform(-8, 8, (20_000 // classes, classes))).float()
        logits[:, 1] = logits[:, 0]  # where a probability near ½ moves most
        moved = decode(encode(logits, "float16")).float().softmax(1) - logits.softmax(1)
        assert moved.abs().max() < 1e-3
