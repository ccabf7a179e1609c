"""A Lab for models that look at a picture several times: whole, and enlarged in tiles (LLaVA-NeXT, LLaVA-OneVision).

`Run.views` says where every token of every view stands in the sequence and on the picture; `Run.map` and the patch grid
are the overview's. What has not been taught to tell views apart asks for `inputs` or `pixels` as of a single square, and is
refused in one line before it starts: a map that mixed the views would be silently wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.geometry import View
from llava_lab.models import layout
from llava_lab.models.card import Card
from llava_lab.models.lab import Lab
from llava_lab.models.pictures import PictureLike, read_picture
from llava_lab.models.tiling import Tiling
from llava_lab.results import Run

WORKS = (
    "attention, rollout, value_attention (a map for each view), and what alters the picture itself: occlusion, coarse occlusion, "
    "rise, shapley, kernel_shap, faithfulness, compare with these"
)


class TiledLab(Lab):
    """A LLaVA-NeXT or LLaVA-OneVision with its processor. See `Lab`."""

    preprocessing: Any  # a Tiling

    def __init__(self, model: Any, processor: Any, *, name: str = "model", card: Card | None = None) -> None:
        super().__init__(model, processor, name=name, card=card)
        template = self.processor.chat_template
        if template and "ASSISTANT:" not in template:  # 1.6 comes with Vicuna, Mistral, Yi, ... each with its own turns
            self.prompt = "chat"

    def measure(self) -> None:
        self.grid = layout.patch_grid(self.model)
        config: Any = self.model.config
        vision = config.vision_config
        self.preprocessing = Tiling.of(
            self.processor.image_processor,
            image_size=vision.image_size,
            patch=vision.patch_size,
            grid=self.grid,
            pinpoints=config.image_grid_pinpoints,
            most=_most(config),
        )

    def pixels(self, picture: np.ndarray, fit: str | None = None) -> Tensor:
        raise OptionError(self._refusal())

    def inputs(self, run: Run, *, picture: np.ndarray | None = None, tiles: bool = False) -> dict[str, Tensor]:
        """As `Lab.inputs`, with ``image_sizes`` beside; `tiles` is the caller's word that it tells views apart."""
        if not tiles:
            raise OptionError(self._refusal())
        return super().inputs(run, picture=picture, tiles=tiles)

    def shown(self, picture: np.ndarray, fit: str | None = None) -> dict[str, Tensor]:
        self.preprocessing.mode(fit)
        made = self.preprocessing.inputs(picture)
        return {
            "pixel_values": made["pixel_values"].to(self.device, self.dtype),
            "image_sizes": made["image_sizes"].to(self.device),
        }

    def image_tokens(self, picture: PictureLike | None) -> int:
        if picture is None:
            raise OptionError(
                f"how many image tokens {self.name!r} makes depends on the picture's shape; give the picture, or ask first"
            )
        height, width = read_picture(picture).shape[:2]
        return self.preprocessing.count(width, height)

    def views(self, width: int, height: int, span: tuple[int, int]) -> tuple[View, ...]:
        found = self.preprocessing.views(width, height, span[0])
        if found[-1].stop != span[1]:
            raise CheckpointError(f"expected {span[1] - span[0]} image tokens in two views, found {found[-1].stop - span[0]}")
        return found

    def _refusal(self) -> str:
        return (
            f"{self.name!r} looks at a picture whole and in tiles, and this was made for one square of image tokens; "
            f"with tiles work {WORKS}"
        )


def _most(config: Any) -> int | None:
    """How many squares' worth of cells OneVision's tiles may have, as ``anyres_max_9`` says; NeXT has no limit."""
    named = getattr(config, "vision_aspect_ratio", None)
    if named is None:
        return None
    number = str(named).removeprefix("anyres_max_")
    if not number.isdecimal() or int(number) < 1:
        raise CheckpointError(f"vision_aspect_ratio must be anyres_max_N, got {named!r}")
    return int(number)
