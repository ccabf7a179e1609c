"""The models that are loaded by a bare name: one table for `load`, for every command and for doctor.

    MODELS["tiny"].knows  # "Trained on drawn pictures of one to four things ..."

Standard library only, so that ``llava-lab --help`` can name them without torch. What a model knows is one sentence about what it
was trained on, in which language, and for which kinds of questions; `load` puts it on the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ASSETS = Path(__file__).resolve().parent / "assets"
ABLATION = ASSETS / "ablation"  # the shipped comparison of connectors and its models
PHOTO_COMPARISON = ASSETS / "ablation-photos"  # the same on photographs: numbers alone

DRAWN = "drawn pictures of one to four things (12 kinds, 8 colors, 2 sizes)"
ASKED = "color, kind, size, place, number, whether something is there, and how two things stand or compare"


@dataclass(frozen=True)
class Shipped:
    """A model with a bare name."""

    folder: Path
    knows: str
    # made of packages, with only connector and LoRA in the folder (`llava_lab.models.formats`)
    parts: bool = False
    # the folder whose `scope.npz` says which pictures it was trained on; None where none was measured
    scope: Path | None = None
    # whether it reads the words of that world alone
    few_words: bool = False


MODELS: Mapping[str, Shipped] = MappingProxyType(
    {
        "tiny": Shipped(
            ASSETS / "tiny",
            f"Trained on {DRAWN}, in a small English of its own, to answer questions of {ASKED}; it knows no photographs.",
            scope=ASSETS / "tiny",
            few_words=True,
        ),
        "tiny-linear": Shipped(
            ABLATION / "linear",
            f"tiny with a linear connector after a short training, for comparison: {DRAWN}, the same English and questions.",
            scope=ASSETS / "tiny",
            few_words=True,
        ),
        "tiny-mlp": Shipped(
            ABLATION / "mlp2x_gelu",
            f"tiny with an MLP connector after a short training, for comparison: {DRAWN}, the same English and questions.",
            scope=ASSETS / "tiny",
            few_words=True,
        ),
        "smol": Shipped(
            ASSETS / "smol",
            f"A pretrained English language model that was shown {DRAWN} and asked about {ASKED}; it knows no photographs.",
            parts=True,
            scope=ASSETS / "tiny",  # it has tiny's eyes, and saw the same pictures
        ),
        "photo": Shipped(
            ASSETS / "photo",
            "A pretrained English language model that was shown photographs of things of many kinds, alone and in collages, "
            "and asked what they are, where, how many, and whether something is there.",
            parts=True,
        ),
    }
)
