"""Stage 0a of `tiny`: the vision tower learns from pictures with captions, and from what each patch shows.

Two losses. The contrastive one is CLIP's, with a small text encoder that is thrown away after,
and one hard negative per picture whose colours or kinds are swapped between things. The dense
one teaches every patch, at the layer LLaVA reads (-2), the kind, colour and size of the thing
that covers it, where that thing's centre lies, and where the patch itself lies. The dense loss
is not in CLIP's recipe: it is what makes a tower this small useful after minutes, and the model
card says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from llava_lab.training.text import IGNORE
from llava_lab.training.tiny.pictures import Pool, patch_places
from llava_lab.worlds.drawing import COLORS, KINDS
from llava_lab.worlds.picturebook import caption
from llava_lab.worlds.scenes import COLOR_NAMES, HELD_OUT, KIND_NAMES, Scene

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TEXT_WIDTH = 128
CONTRASTIVE_WEIGHT = 0.3


def normalise(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, side, side, 3) -> float32 (N, 3, side, side) scaled as CLIP's image processor scales."""
    drawn = pictures if isinstance(pictures, Tensor) else torch.from_numpy(np.array(pictures))
    pixels = drawn.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


class TowerHeads(nn.Module):
    """Everything stage 0a trains beside the tower, thrown away after."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.kind_head = nn.Linear(width, len(KINDS) + 1)
        self.color_head = nn.Linear(width, len(COLORS) + 1)
        self.size_head = nn.Linear(width, 2)
        self.place_head = nn.Linear(width, 5)  # own x, y; centre's offset x, y; is the centre here
        self.text_embed = nn.Embedding(vocabulary, TEXT_WIDTH)
        self.text_position = nn.Parameter(torch.randn(64, TEXT_WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(TEXT_WIDTH, 4, 2 * TEXT_WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text_head = nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)
        self.picture_head = nn.Linear(width, TEXT_WIDTH, bias=False)
        self.temperature = nn.Parameter(torch.tensor(2.6))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Captions (N, T) with mask -> unit vectors (N, D)."""
        hidden = self.text_embed(ids) + self.text_position[: ids.shape[1]]
        hidden = self.text(hidden, src_key_padding_mask=~mask)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.text_head(pooled).float(), dim=-1)


class TowerData(Dataset):
    """Batch number -> pixels, patch truth, captions and their hard negatives."""

    def __init__(self, pool: Pool, tokenizer: PreTrainedTokenizerFast, *, batch: int, grid: int, seed: int) -> None:
        self.pool, self.tokenizer, self.batch, self.grid, self.seed = pool, tokenizer, batch, grid, seed

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        chosen = batch_indices(len(self.pool), self.batch, step, self.seed)
        rng = np.random.default_rng((self.seed, 1, step))
        scenes = [self.pool.scene(int(i)) for i in chosen]
        texts = [caption(s) for s in scenes] + [caption(swapped(s, rng)) for s in scenes]
        text = self.tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
        truth = patch_truth(self.pool.owners[chosen], self.pool.things[chosen], self.grid)
        mask = text["attention_mask"].bool()
        longest = int(mask.sum(1).max())
        return {
            "pictures": torch.from_numpy(self.pool.pictures[chosen]),
            "text": text["input_ids"][:, :longest],
            "mask": mask[:, :longest],
            **truth,
        }


def batch_indices(total: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Sorted picture numbers of one step: passes over the whole pool, each in its own random order."""
    per_pass = max(1, total // batch)
    order = np.random.default_rng((seed, 3, step // per_pass)).permutation(total)
    at = (step % per_pass) * batch
    return np.sort(order[at : at + batch])


def patch_truth(owners: np.ndarray, things: np.ndarray, grid: int) -> dict[str, Tensor]:
    """What each patch is taught. owners (N, P), things (N, 4, 6) -> long (N, P) labels and float (N, P, 5) places."""
    rows, empty, places = patch_places(owners, things, grid)
    return {
        "kind": torch.from_numpy(np.where(empty, len(KINDS), rows[:, :, 0]).astype(np.int64)),
        "color": torch.from_numpy(np.where(empty, len(COLORS), rows[:, :, 1]).astype(np.int64)),
        "large": torch.from_numpy(np.where(empty, IGNORE, rows[:, :, 2]).astype(np.int64)),
        "place": torch.from_numpy(places),
    }


def swapped(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with attributes exchanged between two things, or one attribute changed: a hard negative."""
    things = list(scene.things)
    order = [int(i) for i in rng.permutation(len(things))]
    if len(things) > 1:
        a, b = order[:2]
        key = "color" if rng.random() < 0.6 else "size"
        first, second = getattr(things[a], key), getattr(things[b], key)
        if first != second:
            changed = {a: replace(things[a], **{key: second}), b: replace(things[b], **{key: first})}
            if not any(t.held_out for t in changed.values()):
                return replace(scene, things=tuple(changed.get(i, t) for i, t in enumerate(things)))
    i = order[0]
    while True:
        new: dict[str, Any] = (
            {"color": str(rng.choice(COLOR_NAMES))} if rng.random() < 0.5 else {"kind": str(rng.choice(KIND_NAMES))}
        )
        other = replace(things[i], **new)
        if other != things[i] and (other.color, other.kind) not in HELD_OUT:
            things[i] = other
            return replace(scene, things=tuple(things))


def tower_loss(tower: nn.Module, heads: TowerHeads, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Dense loss at layer -2 plus the contrastive loss of the pooled output."""
    out = tower(normalise(batch["pictures"].numpy()), output_hidden_states=True)
    patches = out.hidden_states[-2][:, 1:]
    dense, seen = _dense(heads, patches, batch)
    pictures = F.normalize(heads.picture_head(out.pooler_output).float(), dim=-1)
    texts = heads.encode_text(batch["text"], batch["mask"])
    n = len(pictures)
    scores = pictures @ texts[:n].T * heads.temperature.exp()
    hard = (pictures * texts[n:]).sum(-1, keepdim=True) * heads.temperature.exp()
    labels = torch.arange(n)
    contrast = (F.cross_entropy(torch.cat([scores, hard], 1), labels) + F.cross_entropy(scores.T, labels)) / 2
    seen["contrast"] = round(float((scores.argmax(1) == labels).float().mean()), 4)
    return dense + CONTRASTIVE_WEIGHT * contrast, seen


def _dense(heads: TowerHeads, patches: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    things = batch["kind"] != len(KINDS)
    kind, color, size = (head(patches).float() for head in (heads.kind_head, heads.color_head, heads.size_head))
    weight = torch.where(things, 1.0, 0.15)
    loss = sum(
        (F.cross_entropy(scores.flatten(0, 1), batch[name].flatten(), reduction="none") * weight.flatten()).sum() / weight.sum()
        for name, scores in (("kind", kind), ("color", color))
    )
    loss = loss + 0.5 * F.cross_entropy(size.flatten(0, 1), batch["large"].flatten(), ignore_index=IGNORE)
    place = heads.place_head(patches).float()
    loss = loss + F.smooth_l1_loss(place[..., :2], batch["place"][..., :2], beta=0.1)
    loss = loss + 2 * F.smooth_l1_loss(place[..., 2:4][things], batch["place"][..., 2:4][things], beta=0.1)
    here = F.binary_cross_entropy_with_logits(place[..., 4], batch["place"][..., 4] * things, pos_weight=torch.tensor(5.0))
    right = {
        "kind": (kind.argmax(-1) == batch["kind"])[things].float().mean(),
        "color": (color.argmax(-1) == batch["color"])[things].float().mean(),
        "size": (size.argmax(-1) == batch["large"])[things].float().mean(),
        "here": ((place[..., 4] > 0) == (batch["place"][..., 4] * things > 0)).float().mean(),
    }
    return loss + 0.5 * here, {name: round(float(value), 4) for name, value in right.items()}
