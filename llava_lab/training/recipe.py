"""Recipes as plain data. An experiment is a recipe with one field changed (`dataclasses.replace`).

`TINY` makes the shipped model in LLaVA's published order: a vision tower and a language model
first, each on its own, then stage 1 (connector only, captions) and stage 2 (connector and
language model, conversations). Sources: LLaVA-1.5, arXiv 2310.03744, section 3 and Table 9;
haotian-liu/LLaVA @ c121f04 ``scripts/v1_5``. Sizes and rates are our own, for two CPU cores.

    short = replace(TINY, align=replace(TINY.align, steps=100))
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """Sizes of a small LLaVA; every part is a stock transformers class."""

    image: int = 96
    patch: int = 8
    vision_width: int = 192
    vision_layers: int = 5
    vision_heads: int = 3
    vision_mlp: int = 768
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    mlp: int = 640
    vocabulary: int = 1024
    context: int = 2048
    feature_layer: int = -2

    @property
    def grid(self) -> int:
        return self.image // self.patch


@dataclass(frozen=True)
class Stage:
    """One stage: what trains, for how long, how fast."""

    name: str
    trains: tuple[str, ...]  # parts of the model that change; everything else keeps its bits
    steps: int
    batch: int
    rate: float  # AdamW: embeddings, norms, biases, heads
    matrix_rate: float = 0.0  # Muon for weight matrices; 0 gives them to AdamW too
    warmup: float = 0.03  # share of the steps, LLaVA's own
    final: float = 0.02  # the rate ends at this share of its peak
    decay: float = 0.0
    clip: float = 1.0
    turns: int = 0  # questions per picture
    early: int = 0  # stage language: steps of mostly single facts before mostly whole questions


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, with the seed."""

    name: str = "tiny"
    seed: int = 0
    pictures: int = 100_000  # drawn once, shared by every stage
    architecture: Architecture = field(default_factory=Architecture)
    tower: Stage = Stage("tower", ("vision_tower",), steps=1300, batch=64, rate=1e-3, matrix_rate=0.02)
    language: Stage = Stage(
        "language",
        ("language_model", "lm_head"),
        steps=4200,
        batch=12,
        rate=1e-3,
        matrix_rate=0.01,
        decay=0.05,
        turns=8,
        early=1200,
    )
    align: Stage = Stage("align", ("multi_modal_projector",), steps=300, batch=16, rate=1e-3, matrix_rate=0.02)
    instruct: Stage = Stage(
        "instruct",
        ("multi_modal_projector", "language_model", "lm_head"),
        steps=3200,
        batch=12,
        rate=1e-3,
        matrix_rate=0.01,
        decay=0.05,
        turns=8,
    )

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.tower, self.language, self.align, self.instruct


TINY = Recipe()


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: their rank, scale and dropout."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05


@dataclass(frozen=True)
class LlavaStage:
    """One of LLaVA's two stages on data in its format. `sources` says where each number was read."""

    name: str  # align or instruct
    trains: tuple[str, ...]  # parts of the model; with `lora` the language model's adapters stand for its weights
    rate: float  # AdamW's peak
    batch: int  # samples in a step, over all processes
    epochs: float = 1.0
    connector_rate: float | None = None  # the connector's own peak
    warmup: float = 0.03  # share of the steps; cosine down to nothing after it
    decay: float = 0.0
    clip: float = 1.0
    fit: str | None = None  # how pictures become square; None is the checkpoint's own way
    group: str = "none"  # or modality: batches of one modality and like lengths
    lora: Lora | None = None
    sources: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LlavaRecipe:
    """Both stages as published, and what they start from."""

    name: str
    vision: str
    language: str
    connector: str
    align: LlavaStage
    instruct: LlavaStage
    instruct_lora: LlavaStage | None = None

    def stage(self, name: str) -> LlavaStage:
        return {"align": self.align, "instruct": self.instruct}[name]


_PRETRAIN = "haotian-liu/LLaVA @ c121f04 scripts/v1_5/pretrain.sh"
_FINETUNE = "haotian-liu/LLaVA @ c121f04 scripts/v1_5/finetune.sh"
_LORA = "haotian-liu/LLaVA @ c121f04 scripts/v1_5/finetune_lora.sh"
_V1_PRETRAIN = "haotian-liu/LLaVA @ c121f04 scripts/pretrain.sh"
_V1_PAPER = "arXiv 2304.08485 appendix"
_CLIP = "transformers' default max_grad_norm, which the scripts leave as it is; under DeepSpeed not verified"
_CONNECTOR = ("multi_modal_projector",)
_BOTH = ("multi_modal_projector", "language_model", "lm_head")

LLAVA_15_7B = LlavaRecipe(
    name="llava-1.5-7b",
    vision="openai/clip-vit-large-patch14-336",
    language="lmsys/vicuna-7b-v1.5",
    connector="mlp2x_gelu",
    align=LlavaStage(
        "align",
        _CONNECTOR,
        rate=1e-3,
        batch=256,
        fit="crop",
        sources=(
            ("rate", f"{_PRETRAIN}; arXiv 2310.03744 A.3: half of LLaVA's, because of the MLP"),
            ("batch", f"{_PRETRAIN}: 32 on each of 8 GPUs; Table 9"),
            ("epochs", f"{_PRETRAIN}; Table 9"),
            ("warmup", f"{_PRETRAIN}: warmup_ratio 0.03, cosine; Table 9"),
            ("decay", f"{_PRETRAIN}: weight_decay 0; Table 9"),
            ("clip", _CLIP),
            ("fit", f"{_PRETRAIN} passes no image_aspect_ratio: square, which is resize and centre crop"),
            ("group", f"{_PRETRAIN} passes no group_by_modality_length"),
        ),
    ),
    instruct=LlavaStage(
        "instruct",
        _BOTH,
        rate=2e-5,
        batch=128,
        fit="pad",
        group="modality",
        sources=(
            ("rate", f"{_FINETUNE}; arXiv 2310.03744 Table 9"),
            ("batch", f"{_FINETUNE}: 16 on each of 8 GPUs; Table 9"),
            ("epochs", f"{_FINETUNE}; Table 9"),
            ("warmup", f"{_FINETUNE}: warmup_ratio 0.03, cosine; Table 9"),
            ("decay", f"{_FINETUNE}: weight_decay 0; Table 9"),
            ("clip", _CLIP),
            ("fit", f"{_FINETUNE}: image_aspect_ratio pad"),
            ("group", f"{_FINETUNE}: group_by_modality_length True"),
        ),
    ),
    instruct_lora=LlavaStage(
        "instruct",
        _CONNECTOR,
        rate=2e-4,
        batch=128,
        connector_rate=2e-5,
        fit="pad",
        group="modality",
        lora=Lora(),
        sources=(
            ("rate", _LORA),
            ("batch", f"{_LORA}: 16 on each of 8 GPUs"),
            ("connector_rate", f"{_LORA}: mm_projector_lr"),
            ("epochs", _LORA),
            ("warmup", f"{_LORA}: warmup_ratio 0.03, cosine"),
            ("decay", _LORA),
            ("clip", _CLIP),
            ("fit", f"{_LORA}: image_aspect_ratio pad"),
            ("group", f"{_LORA}: group_by_modality_length True"),
            ("lora", f"{_LORA}: lora_r 128, lora_alpha 256; dropout 0.05 is train.py's default"),
        ),
    ),
)

LLAVA_1_7B = LlavaRecipe(
    name="llava-1-7b",
    vision="openai/clip-vit-large-patch14",
    language="lmsys/vicuna-7b-v1.3",
    connector="linear",
    align=LlavaStage(
        "align",
        _CONNECTOR,
        rate=2e-3,
        batch=128,
        fit="crop",
        sources=(
            ("rate", f"{_V1_PRETRAIN}; {_V1_PAPER}"),
            ("batch", f"{_V1_PAPER}"),
            ("epochs", f"{_V1_PAPER}: one epoch of CC-595K"),
            ("warmup", f"{_V1_PAPER}: 3%, cosine"),
            ("decay", f"{_V1_PAPER}: no weight decay"),
            ("clip", _CLIP),
            ("fit", f"{_V1_PRETRAIN} passes no image_aspect_ratio: resize and centre crop"),
            ("group", f"{_V1_PRETRAIN} passes no group_by_modality_length"),
        ),
    ),
    instruct=LlavaStage(
        "instruct",
        _BOTH,
        rate=2e-5,
        batch=32,
        epochs=3.0,
        fit="crop",
        sources=(
            ("rate", f"{_V1_PAPER}; scripts/finetune_full_schedule.sh"),
            ("batch", f"{_V1_PAPER}; scripts/finetune_full_schedule.sh gives 128 on 8 GPUs, the two disagree"),
            ("epochs", f"{_V1_PAPER}: three epochs of Instruct-158K"),
            ("warmup", f"{_V1_PAPER}: 3%, cosine"),
            ("decay", f"{_V1_PAPER}: no weight decay"),
            ("clip", _CLIP),
            ("fit", "scripts/finetune_full_schedule.sh passes no image_aspect_ratio: resize and centre crop"),
            ("group", "scripts/finetune_full_schedule.sh passes no group_by_modality_length"),
        ),
    ),
)

LLAVA_RECIPES = {recipe.name: recipe for recipe in (LLAVA_15_7B, LLAVA_1_7B)}
