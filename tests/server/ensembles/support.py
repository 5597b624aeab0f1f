"""Drawn logits and labels, and what is compared of targets made of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.nn.functional import cross_entropy

Problem = tuple[Tensor, Tensor]
Labelled = Callable[[Tensor, Tensor], Tensor]
quick = settings(max_examples=40)


@st.composite
def problems(
    draw: st.DrawFn,
    scales: tuple[float, ...] = (1.0, 8.0, 100.0),
    students: tuple[int, int] = (1, 5),
    dtype: type[np.floating] = np.float64,
    step: float | None = None,
) -> Problem:
    """Logits and labels; with `step`, logits are multiples of it, so that shifting them by others is exact."""
    shape = draw(st.tuples(st.integers(*students), st.integers(1, 4), st.integers(1, 6)))
    scale = draw(st.sampled_from(scales))
    if step is None:
        elements = st.floats(-scale, scale, width=32 if dtype is np.float32 else 64)
    else:
        elements = st.integers(-int(scale / step), int(scale / step)).map(lambda n: n * step)
    logits = draw(arrays(dtype, shape, elements=elements))
    labels = draw(arrays(np.int64, shape[1:2], elements=st.integers(0, shape[2] - 1)))
    return torch.from_numpy(logits), torch.from_numpy(labels)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.double(), labels, reduction="none")


def probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits.double(), -1)
