"""Every attribution method under one name and one signature. To add a method, write its `Method` and list it here.

It decides nothing about how a map is made; that is each method's own file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.attribution.attention import ATTENTION
from llava_lab.attribution.base import Method
from llava_lab.attribution.baselines import CENTER, RANDOM
from llava_lab.attribution.occlusion import OCCLUSION
from llava_lab.attribution.rollout import ROLLOUT
from llava_lab.attribution.targets import Wanted, resolve_targets
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.results import Relevance, Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

METHODS: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in (ROLLOUT, ATTENTION, OCCLUSION, RANDOM, CENTER)}
)


def attribute(lab: Lab, run: Run, *, method: str = "rollout", target: Wanted = None, **options: Any) -> Relevance:
    """Which patches of the picture the answer came from, as `method` understands it.

    `target`: None or ``"answer"`` the whole answer, ``"words"`` a map per word, an int an answer token,
    a str a word, ``("red", "blue")`` the contrast of two words, a list several of these. Several targets
    share the passes. The options of each method, with defaults, are in ``METHODS[method].options``.

    Raises OptionError (unknown method or option), TargetError (not in the answer), CheckpointError
    (the run was made by another checkpoint).
    """
    if method not in METHODS:
        raise OptionError(f"no method {method!r}; the methods are {', '.join(METHODS)}")
    chosen = METHODS[method].with_defaults(options)
    weights = lab.fingerprint
    if run.fingerprint != weights:
        raise CheckpointError(f"expected a run made by {lab.name!r}, got one by {run.model!r} with other weights; ask again")
    targets = resolve_targets(lab, run, target)
    start = time.perf_counter()
    maps = METHODS[method].compute(lab, run, targets, chosen)
    assert np.isfinite(maps.values).all(), f"{method} gave values that are not finite"
    return Relevance(
        values=maps.values.astype(np.float32),
        targets=targets,
        method=method,
        options={name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()},
        map=run.map,
        model=lab.name,
        fingerprint=weights,
        seconds=time.perf_counter() - start,
        passes={"forward": 0, "backward": 0, **maps.passes},
        notes=maps.notes,
        extras=maps.extras,
    )
