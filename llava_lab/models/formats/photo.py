"""``load("photo")``: a LLaVA that looks at photographs, by LLaVA's own recipe: both ends pretrained, the connector trained here.

The eyes are EfficientNet-Lite2, which saw ImageNet's photographs (`efficientnet`); the language model is SmolLM2-135M, as in
`smol`. Both come from packages of the index; the repository holds the connector and LoRA alone, in ``assets/photo``.

    model, processor = load_photo(torch.float32)

The square is 384 pixels, 12 x 12 patches over the whole picture: the picture is padded to a square as in LLaVA-1.5, never cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from llava_lab.models import connectors, layout
from llava_lab.models.formats import efficientnet, smol

NAME = "photo"
PARAMETERS = 147_000_000  # about; the device is chosen before anything is read
SIDE = 384
PLACES = 16  # channels beside the tower's own 1,280 that say where a patch lies
# Share of a patch's features from around it. The tower's classifier calls 41% of the patches of training photographs in new cuts
# by the photograph's name as they come and 60% so (64% at a share of 1); in a collage's quarter 44% and 65%.
AROUND = 2 / 3
# Units of the connector's hidden layer. LLaVA-1.5 has as many as its language model is wide: 4,096, four times a patch's width.
# SmolLM2's width, 576, is too little for a thousand classes: 400 steps of `words` give 37% of kept-out photographs their own name
# by the mean token, with 2,048 units 69% (the wanted tokens 85%).
HIDDEN = 2048


def assemble(
    *, language: Path | None = None, tower: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model with an untrained connector and no LoRA, and its processor; the tower's classifier stays in `tower.head`."""
    eyes = efficientnet.read_tower(tower, image_size=SIDE, place_channels=PLACES, around=AROUND)
    seen = LlavaConfig(
        vision_config=eyes.config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(SIDE // efficientnet.STRIDE) ** 2,
    )
    model, processor = smol.join(eyes, seen, image_processor(), language=language, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = connectors.build("mlp2x_gelu", connectors.sizes_of(model.config), {"width": HIDDEN})
    layout.replace_connector(model, wide.to(dtype).eval())
    setattr(model.config, connectors.TYPE, wide.kind)
    setattr(model.config, connectors.OPTIONS, dict(wide.options))
    return model, processor


def image_processor() -> Any:
    """Resizes to the square and scales as the tower was trained; the lab pads to a square first."""
    return CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[efficientnet.MEAN] * 3,
        image_std=[efficientnet.STD] * 3,
    )


def load_photo(
    dtype: torch.dtype, folder: Path | None = None, **parts: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The whole model from its parts, frozen, and its processor; `folder` holds the trained weights, None: as shipped."""
    folder = smol.trained_folder(folder, NAME)
    model, processor = assemble(**parts)
    smol.add_weights(model, folder, NAME)
    return smol.finished(model, dtype), processor
