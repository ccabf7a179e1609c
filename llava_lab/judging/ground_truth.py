"""Does a map mark what decides the question? Four measures against the masks of the deciding things.

This is agreement with the world. A model may rightly answer from something else, and a map that says so scores
low here and high in `faithfulness`: the two are never averaged. A patch counts as part of the deciding things
when they cover at least `INSIDE` of it (on a grid too coarse for that, half of what they cover of their fullest patch).

``pointing``: whether the highest patch is theirs (ties at random). ``mass``: their share of the positive part of
the map, by area; a map with no positive part has 0. ``auc``: chance that a patch of theirs is higher than another
patch. ``iou``: intersection over union with as many of the highest patches as they have.

    truth = ground_truth(run, attribute(lab, run), deciding)  # a mask of the picture's height and width

Source: the pointing game, Zhang et al. 2016 (arXiv 1608.00507); masks as ground truth of a drawn world as in
Arras et al. 2022 (arXiv 2003.07258), whose relevance mass is ``mass``.
"""

from __future__ import annotations

import numpy as np

from llava_lab.attribution.controls import center_bump
from llava_lab.checks import array_of, entry, whole_number
from llava_lab.errors import OptionError
from llava_lab.judging.faithfulness import check_masks
from llava_lab.results import GroundTruth, Relevance, Run
from llava_lab.stats import iou, roc_auc

INSIDE = 0.25  # of a patch: a small thing of the picture book is two patches and a quarter wide
SEEN = 0.01  # of some patch, or the things lie outside the crop
MEASURES = ("pointing", "mass", "auc", "iou")


@entry
def ground_truth(run: Run, rel: Relevance, deciding: np.ndarray, *, seeds: int = 100, seed: int = 0) -> GroundTruth:
    """Compare `rel` with the masks of the deciding things, bool (things, height, width) or one (height, width).

    In the picture book: ``scene.masks()[list(question.deciding)]``. Runs no model.

    Raises OptionError when nothing decides (an absence has no place), or the model saw none of it.

    >>> relevance = ll.attribute(lab, run, method="center")
    >>> ll.ground_truth(run, relevance, run.picture[..., 0] >= 0).measures
    ('pointing', 'mass', 'auc', 'iou')
    """
    seeds, seed = whole_number("seeds", seeds, least=1), whole_number("seed", seed)
    if rel.map != run.map or rel.fingerprint != run.fingerprint:
        raise OptionError("expected a map of this run, got one made for another picture or by another checkpoint")
    share = deciding_share(run, deciding)
    patches = np.flatnonzero(run.map.coverage().ravel() > 0)
    truth = share.ravel()[patches]
    inside = truth >= min(INSIDE, truth.max() / 2)
    maps = rel.values.reshape(len(rel.values), -1)[:, patches]
    chance = np.random.default_rng((seed, 29)).random((seeds, len(patches)))
    bump = center_bump(run.map.rows, run.map.cols).ravel()[patches]
    return GroundTruth(
        method=rel.method,
        options=rel.options,
        targets=rel.targets,
        measures=MEASURES,
        values=np.array([_measure(values, truth, inside) for values in maps]),
        random=np.array([_measure(values, truth, inside) for values in chance]),
        center=np.array(_measure(bump, truth, inside)),
        deciding=share,
        fingerprint=run.fingerprint,
        notes=(f"The deciding things hold {truth.sum() / len(truth):.0%} of the picture the model saw.",),
    )


def deciding_share(run: Run, deciding: np.ndarray) -> np.ndarray:
    """Share of each patch that any deciding thing covers, float32 (rows, cols)."""
    if not array_of("deciding", deciding).size:
        raise OptionError("nothing in the picture decides this question (an absence does), so there is no place to compare with")
    share = run.map.mask_to_patches(np.any(check_masks(run, deciding, "deciding"), axis=0))
    if share.max() < SEEN:
        raise OptionError("the model saw nothing of the deciding things; ask with fit='pad' to show the whole picture")
    return share


def _measure(values: np.ndarray, truth: np.ndarray, inside: np.ndarray) -> tuple[float, float, float, float]:
    """In the order of MEASURES, for values (patches,)."""
    best = values == values.max()
    positive = np.clip(values.astype(np.float64), 0, None)
    total = positive.sum()
    mass = float(positive @ truth / total) if total else 0.0
    return float(inside[best].mean()), mass, roc_auc(values, inside), iou(values, inside)
