"""What to put where a patch is taken away. No fill is neutral, so a claim should hold under two of them.

Fills are made in the model's own (normalised) pixel space, for the whole square at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from llava_lab.errors import OptionError
from llava_lab.geometry import PictureMap

if TYPE_CHECKING:
    from llava_lab.models import Lab

FILLS = ("grey", "mean", "blur")
BLUR = 1 / 12  # standard deviation of the blur, as a share of the square's side

Pixels = Float[Tensor, "1 3 Y X"]


def fill_pixels(lab: Lab, pixels: Pixels, fill: str, where: PictureMap) -> Pixels:
    """The square to take filled patches from: ``grey`` is mid-grey, ``mean`` the picture's mean colour, ``blur`` its blur."""
    if fill not in FILLS:
        raise OptionError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}")
    if fill == "blur":
        return _blur(pixels, BLUR * pixels.shape[-1])
    if fill == "grey":
        images = lab.processor.image_processor
        normal = (images.image_mean or (0.0,) * 3, images.image_std or (1.0,) * 3)
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in normal)
        color = (0.5 - mean) / std
    else:  # of the picture alone: padding has no say
        left, top = max(round(where.offset_x), 0), max(round(where.offset_y), 0)
        right, bottom = round(where.offset_x + where.width * where.scale_x), round(where.offset_y + where.height * where.scale_y)
        color = pixels[..., top:bottom, left:right].float().mean((2, 3), keepdim=True)
    return color.to(pixels).expand_as(pixels)


def _blur(pixels: Pixels, sigma: float) -> Pixels:
    """Gaussian blur, edges mirrored."""
    reach = min(int(3 * sigma + 0.5), min(pixels.shape[-2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=pixels.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    planes = functional.pad(pixels.float().transpose(0, 1), (reach, reach, reach, reach), mode="reflect")
    blurred = functional.conv2d(functional.conv2d(planes, kernel), kernel.transpose(2, 3))
    return blurred.transpose(0, 1).to(pixels.dtype)
