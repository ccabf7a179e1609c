"""Whether a picture is like those a model was trained on: a distance in the features of its vision tower.

    Familiar.load(folder / "scope.npz").distance(read_features(lab.model, lab.pixels(picture)))

A picture is the mean of what the tower passes on of its patches. Training pictures give a mean and a covariance, which is pulled
towards a multiple of the identity by `SHRINKAGE`, as the features lie near a plane; the distance is Mahalanobis', its square
divided by the width. The threshold is a quantile over held-out pictures. How often unseen pictures of the same world lie beyond
it, and how many of others do, stands beside it. `llava_lab.evaluation.scope` measures all this.

What it does not know: a drawn picture of other shapes on pale paper may lie well within (most of easy-VQA's pictures do). It
tells photographs from drawings, not what is drawn.

Source: Lee et al. 2018 (arXiv 1807.03888, section 2.1), without classes; the shrinkage is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from llava_lab.capture import evaluating
from llava_lab.models import layout
from llava_lab.results import Saved, Table

SHRINKAGE = 0.1


@dataclass(frozen=True)
class Familiar(Saved):
    """Where the training pictures of a tower lie, how far is too far, and what was measured with that."""

    KIND: ClassVar[str] = "scope"

    mean: Float32[np.ndarray, " width"]
    whitening: Float32[np.ndarray, "width width"]  # upper triangle of the inverse covariance's factor
    threshold: float
    tower: str  # fingerprint of the vision tower's weights
    words: tuple[str, ...]  # of the questions the model was trained on
    command: str  # that makes this file
    # name -> {"pictures": n, "beyond": share, "interval": [low, high], "median": distance}
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, features: Float[np.ndarray, "N F"], held_out: Float[np.ndarray, "M F"], quantile: float, **about: Any
    ) -> Familiar:
        """Fit to pictures' features, with the threshold at a quantile of others'. `about` are the remaining fields."""
        mean, spread = features.mean(0), np.cov(features.T.astype(np.float64))
        spread += SHRINKAGE * np.trace(spread) / len(spread) * np.eye(len(spread))
        whitening = np.linalg.cholesky(np.linalg.inv(spread)).astype(np.float32)
        bare = cls(mean.astype(np.float32), whitening, np.inf, **about)
        distances = [bare.distance(row) for row in held_out]
        return cls(bare.mean, bare.whitening, float(np.quantile(distances, quantile)), **about)

    def distance(self, features: Float[np.ndarray, " F"]) -> float:
        """How far a picture's features lie from the training pictures'; 1 is where those lie on average, or near it."""
        return float(np.square((features - self.mean) @ self.whitening).mean())

    def table(self) -> Table:
        """What was measured, one kind of pictures a row."""
        rows = []
        for name, row in self.measured.items():
            low, high = row["interval"]
            beyond = f"{row['beyond']:.1%} ({low:.1%} to {high:.1%})"
            rows.append((name, str(row["pictures"]), beyond, f"{row['median'] / self.threshold:.2f}"))
        title = f"threshold {self.threshold:.3g}; {self.command}"
        return Table(("pictures", "n", "beyond the threshold", "median distance over it"), tuple(rows), title=title)


def read_features(model: nn.Module, pixel_values: Float[Tensor, "B 3 S S"]) -> Float[np.ndarray, "B F"]:
    """What the tower passes on of each picture, averaged over its patches, float32. Connector and language model do not run."""
    tower: Any = layout.vision_tower(model)
    config: Any = model.config
    with evaluating(model), torch.no_grad():
        states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    features = torch.cat([states[layer] for layer in layout.feature_layers(config)], -1)
    return features[:, int(layout.has_class_token(model)) :].float().mean(1).cpu().numpy()
