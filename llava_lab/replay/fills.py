"""What to put where a patch is taken away. No fill is neutral, so a claim should hold under two of them.

``grey``, ``mean``, ``blur`` and ``noise`` are one square to cut patches from, whatever is taken away;
``neighbours`` is made anew for each hole from what surrounds it. Fills of pixels are made in the model's
own (normalised) pixel space, for the whole square at once; `inpaint`, `mean_fill` and `noise_fill` work
on any grid of values, and so on the picture's tokens too.

    grey = fill_pixels(lab, lab.pixels(picture), "grey", run.map)

Source of the neighbours' fill: the pull-push scheme of Gortler et al. 1996 (The Lumigraph), section 3.4.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from llava_lab.errors import OptionError
from llava_lab.geometry import PictureMap
from llava_lab.models import Lab

FILLS = ("grey", "mean", "blur")  # plain enough to be shown on the picture itself
SQUARES = (*FILLS, "noise")  # one square whatever is taken away
EVERY_FILL = (*SQUARES, "neighbours")
GREY = 128  # of a picture, 0 to 255
BLUR = 1 / 12  # standard deviation of the blur, as a share of the square's side

Pixels = Float[Tensor, "1 3 Y X"]


def fill_pixels(lab: Lab, pixels: Pixels, fill: str, where: PictureMap, *, seed: int = 0) -> Pixels:
    """The square to take filled patches from.

    ``grey`` is mid-grey, ``mean`` the picture's mean colour, ``blur`` its blur, ``noise`` normal noise with the
    picture's mean and spread, the same for the same seed. ``neighbours`` depends on the hole: see `inpaint`.
    """
    if fill not in SQUARES:
        raise OptionError(f"fill must be one of {', '.join(SQUARES)}, got {fill!r}")
    if fill == "blur":
        return blur_fill(pixels, BLUR * pixels.shape[-1])
    if fill == "grey":
        images = lab.processor.image_processor
        normal = (images.image_mean or (0.0,) * 3, images.image_std or (1.0,) * 3)
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in normal)
        return ((0.5 - mean) / std).to(pixels).expand_as(pixels)
    # of the picture alone: padding has no say
    inside = torch.zeros(pixels.shape[-2:], dtype=torch.bool, device=pixels.device)
    across = _pixels_of(where.offset_x, where.width * where.scale_x, pixels.shape[-1])
    inside[_pixels_of(where.offset_y, where.height * where.scale_y, pixels.shape[-2]), across] = True
    return mean_fill(pixels, inside) if fill == "mean" else noise_fill(pixels, inside, seed=seed)


def _pixels_of(start: float, length: float, side: int) -> slice:
    """The pixels of a square's side on which the picture lies; a picture thinner than a pixel has the one it falls in."""
    first, stop = max(round(start), 0), min(round(start + length), side)
    if first < stop:
        return slice(first, stop)
    middle = min(max(int(start + length / 2), 0), side - 1)
    return slice(middle, middle + 1)


def fill_picture(picture: np.ndarray, fill: str, *, seed: int = 0, hidden: np.ndarray | None = None) -> np.ndarray:
    """What takes the place of a picture, uint8 (height, width, 3): as large, float32, 0 to 255.

    ``neighbours`` is made for the places `hidden`, bool (height, width); the other fills do not depend on them.
    """
    pixels = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]
    everywhere = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    if fill == "grey":
        filled = torch.full_like(pixels, GREY)
    elif fill == "mean":
        filled = mean_fill(pixels, everywhere)
    elif fill == "blur":
        filled = blur_fill(pixels, BLUR * max(pixels.shape[-2:]))
    elif fill == "noise":
        filled = noise_fill(pixels, everywhere, seed=seed)
    else:
        assert hidden is not None, "the neighbours of what?"
        filled = inpaint(pixels, torch.from_numpy(hidden)[None])
    return filled[0].permute(1, 2, 0).numpy()


def mean_fill(values: Float[Tensor, "1 C Y X"], inside: Bool[Tensor, "Y X"]) -> Float[Tensor, "1 C Y X"]:
    """Everywhere the mean of `values` over the places `inside`."""
    mean = values[..., inside].float().mean(-1)
    return mean[..., None, None].to(values).expand_as(values)


def noise_fill(values: Float[Tensor, "1 C Y X"], inside: Bool[Tensor, "Y X"], *, seed: int) -> Float[Tensor, "1 C Y X"]:
    """Normal noise, each channel with the mean and spread that `values` has over the places `inside`."""
    known = values[..., inside].float()
    mean, spread = known.mean(-1), known.std(-1, correction=0)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)).to(values.device)  # same on every device
    return (mean[..., None, None] + spread[..., None, None] * noise).to(values)


def inpaint(values: Float[Tensor, "1 C Y X"], hidden: Bool[Tensor, "B Y X"]) -> Float[Tensor, "B C Y X"]:
    """`values` with the `hidden` places filled in smoothly from the places around them, one picture per mask.

    What is known is averaged into ever coarser grids; a hole takes the value of the finest grid that knows
    something there. Where everything is hidden, the mean of all values is left.
    """
    known = (~hidden)[:, None].float()
    everything = values.float().mean((2, 3), keepdim=True)
    return _pull_push(values.float().expand(len(hidden), -1, -1, -1), known, everything).to(values.dtype)


def _pull_push(values: Float[Tensor, "B C Y X"], known: Float[Tensor, "B 1 Y X"], otherwise: Tensor) -> Tensor:
    if bool(known.all()):
        return values
    if max(values.shape[-2:]) == 1:
        return torch.where(known > 0, values, otherwise)
    share = functional.avg_pool2d(known, 2, ceil_mode=True)
    total = functional.avg_pool2d(values * known, 2, ceil_mode=True)
    coarse = _pull_push(total / share.clamp_min(0.25), (share > 0).float(), otherwise)  # 0.25: one known place of four
    smooth = functional.interpolate(coarse, size=values.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, values, smooth)


def blur_fill(pixels: Pixels, sigma: float) -> Pixels:
    """Gaussian blur, edges mirrored."""
    reach = min(int(3 * sigma + 0.5), min(pixels.shape[-2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=pixels.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    planes = functional.pad(pixels.float().transpose(0, 1), (reach, reach, reach, reach), mode="reflect")
    blurred = functional.conv2d(functional.conv2d(planes, kernel), kernel.transpose(2, 3))
    return blurred.transpose(0, 1).to(pixels.dtype)
