"""From images as bytes to the inputs of a model: random crops and flips in one gather, then channel statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional

from codistill.config.data import Augment
from codistill.config.experiment import Experiment
from codistill.peer.draws import derive, uniforms
from codistill_worker.transfers import upload

__all__ = ["augment", "normalise", "view_seed"]


def view_seed(experiment: Experiment, participant: str, step: int) -> int:
    """Return the seed of a participant's augmentation in a step; where all share one view, that of all."""
    return derive(experiment.seed, "augment", "" if experiment.shared_view else participant, step)


def augment(images: torch.Tensor, ids: torch.Tensor, settings: Augment, seed: int) -> torch.Tensor:
    """Return images cropped at random after zero padding, and mirrored at random.

    With padding p, an image is surrounded by p zero pixels on every side. It is then cut to its own size at one of
    (2p+1)² places, each as likely. With `flip` it is mirrored left to right with probability ½ (He et al. 2016, section 4.2). The
    seed and a sample's id alone decide, never the batch around it.

    Args:
        images: uint8 of shape [B, C, H, W], on any device.
        ids: the samples' ids, int64 of shape [B], on the CPU.
        settings: the padding, and whether to flip.
        seed: of the participant and the step, from :func:`view_seed`.

    Returns:
        uint8 of shape [B, C, H, W] on the images' device; the images themselves where no augmentation is set.
    """
    padding = settings.crop_padding
    if not padding and not settings.flip:
        return images
    batch, channels, height, width = images.shape
    draws = uniforms(seed, ids, 3)
    places = (draws[:, :2] * (2 * padding + 1)).long()
    flips = (draws[:, 2:] < 0.5).long() * int(settings.flip)
    top, left, flip = upload(torch.cat([places, flips], 1), images.device).unbind(1)  # one transfer for all three
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] > 0, width - 1 - columns, columns) + left[:, None]
    rows = torch.arange(height, device=images.device) + top[:, None]
    index = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    index = index.view(batch, 1, -1).expand(-1, channels, -1)
    padded = functional.pad(images, (padding,) * 4)
    return padded.flatten(2).gather(2, index).view(batch, channels, height, width)


def normalise(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
) -> torch.Tensor:
    """Return (x/255 − mean)/std, computed in float32.

    Args:
        images: uint8 of shape [B, C, H, W], on any device.
        mean: of each channel, of values scaled to 0..1.
        std: of each channel, likewise.
        dtype: of the result.
        channels_last: whether the channels are innermost in memory.

    Returns:
        `dtype` of shape [B, C, H, W] on the images' device.
    """
    scale, shift = _affine(tuple(mean), tuple(std), images.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    values = images.to(torch.float32, memory_format=layout)
    return values.mul_(scale).add_(shift).to(dtype)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1/(255·std) and −mean/std, float32 of shape [1, C, 1, 1]; cached for the next batches."""
    means, stds = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return (1 / (255 * stds)).to(device, torch.float32), (-means / stds).to(device, torch.float32)
