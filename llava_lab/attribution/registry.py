"""What a method needs of the weights, said before it starts: gradients, or weights that are plain numbers.

Weights packed into 8 or 4 bits (bitsandbytes) answer questions, but their gradients are not those of the model that was
trained, and they cannot be read. Weights that wait elsewhere (`device_map` with offloading) are not there to be read either.
Every other method only runs the model, and works with both.

Every attribution method under one name and one signature. To add a method, write its `Method` and list it here.

It decides nothing about how a map is made; that is each method's own file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from llava_lab.attribution.attention import ATTENTION, RELATIVE_ATTENTION, VALUE_ATTENTION
from llava_lab.attribution.controls import CENTER, EDGES, INVERSE, RANDOM
from llava_lab.attribution.gradients import GRADCAM, GRADIENT_INPUT, INTEGRATED_GRADIENTS, SMOOTHGRAD
from llava_lab.attribution.heads import LOCALIZATION_HEADS
from llava_lab.attribution.logits import DIRECT_LOGIT, LOGIT_LENS_MAP
from llava_lab.attribution.max_flow import ATTENTION_FLOW
from llava_lab.attribution.method import Method
from llava_lab.attribution.occlusion import OCCLUSION, OCCLUSION_COARSE, RISE, TOKEN_KNOCKOUT
from llava_lab.attribution.relevancy import RELEVANCY
from llava_lab.attribution.rollout import ROLLOUT, VISION
from llava_lab.attribution.shapley import GREEDY, KERNEL_SHAP, SHAPLEY
from llava_lab.attribution.tam import TAM
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import connectors, layout
from llava_lab.remote.black_box import BlackBox
from llava_lab.remote.explain import attribute_closed, refuse_inside
from llava_lab.replay.targets import Wanted, resolve_targets
from llava_lab.results import Relevance, Run

if TYPE_CHECKING:
    from llava_lab.models import Lab

GRADIENTS = frozenset(
    {"relevancy", "gradient_input", "integrated_gradients", "smoothgrad", "gradcam"},
)
PLAIN_WEIGHTS = frozenset({"value_attention", "direct_logit", "logit_lens_map", "tam"})


def refuse_unable(model: nn.Module, method: str, name: str) -> None:
    """Raises OptionError (one line) where `method` needs what `model` does not have."""
    packed, away = layout.is_quantized(model), layout.is_offloaded(model)
    if not packed and not away:
        return
    what = "gradients" if method in GRADIENTS else "plain weights" if method in PLAIN_WEIGHTS else None
    if what is None:
        return
    has = "weights packed into 8 or 4 bits" if packed else "weights that wait off the device (device_map)"
    mend = "without quantization" if packed else "on a device that holds it whole"
    raise OptionError(f"method {method!r} needs {what}, and {name!r} has {has}; load it {mend}, or use method='occlusion'")


_ALL = (
    ROLLOUT,
    ATTENTION,
    OCCLUSION,
    RANDOM,
    CENTER,
    OCCLUSION_COARSE,
    TOKEN_KNOCKOUT,
    RISE,
    SHAPLEY,
    KERNEL_SHAP,
    GREEDY,
    TAM,
    DIRECT_LOGIT,
    LOGIT_LENS_MAP,
    EDGES,
    INVERSE,
    VALUE_ATTENTION,
    LOCALIZATION_HEADS,
    RELATIVE_ATTENTION,
    ATTENTION_FLOW,
    RELEVANCY,
    GRADIENT_INPUT,
    INTEGRATED_GRADIENTS,
    SMOOTHGRAD,
    GRADCAM,
    VISION,
)
UNPLACED = (
    "The connector's tokens have no place in the picture: where something was hidden in the pixels the map is a place, "
    "otherwise its cells are numbers of tokens."
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})


def attribute(lab: Lab | BlackBox, run: Run, *, method: str = "rollout", target: Wanted = None, **options: Any) -> Relevance:
    """Which patches of the picture the answer came from, as `method` understands it.

    `target`: None or ``"answer"`` the whole answer, ``"words"`` a map per word, an int an answer token,
    a str a word, ``("red", "blue")`` the contrast of two words, a list several of these. Several targets
    share the passes. The options of each method, with defaults, are in ``METHODS[method].options``. On a closed
    model (`BlackBox`) the methods that need only answers work, within its budget of requests.

    Raises OptionError (unknown method or option), TargetError (not in the answer), CheckpointError
    (the run was made by another checkpoint).
    """
    if method not in METHODS:
        raise OptionError(f"no method {method!r}; the methods are {', '.join(METHODS)}")
    closed = isinstance(lab, BlackBox)
    if closed:
        refuse_inside(method)
    chosen = METHODS[method].with_defaults(options)
    if not isinstance(lab, BlackBox):
        refuse_unable(lab.model, method, lab.name)
    weights = lab.fingerprint
    if run.fingerprint != weights:
        raise CheckpointError(f"expected a run made by {lab.name!r}, got one by {run.model!r} with other weights; ask again")
    targets = resolve_targets(lab, run, target)
    start = time.perf_counter()
    if isinstance(lab, BlackBox):
        maps = attribute_closed(lab, run, targets, METHODS[method], chosen)
    else:
        maps = METHODS[method].compute(lab, run, targets, chosen)
    assert np.isfinite(maps.values).all(), f"{method} gave values that are not finite"
    if run.views:
        maps = replace(maps, notes=(*maps.notes, in_views(run, bool(maps.views))))
    return Relevance(
        values=maps.values.astype(np.float32),
        targets=targets,
        method=method,
        options={name: _plain(value) for name, value in chosen.items()},
        map=run.map,
        model=lab.name,
        fingerprint=weights,
        seconds=time.perf_counter() - start,
        passes={"forward": 0, "backward": 0, **maps.passes},
        notes=maps.notes if closed or connectors.placed(lab.model.config) else (*maps.notes, UNPLACED),
        extras=maps.extras,
        views=run.views if maps.views else (),
        view_values=tuple(values.astype(np.float32) for values in maps.views),
    )


def in_views(run: Run, apart: bool) -> str:
    """What to know of a map where the model looked at the picture several times."""
    names = " and ".join(view.name for view in run.views)
    if apart:
        return f"The picture was seen as {names}: this is the {run.views[0].name}'s map, `views` and `view_values` hold each."
    return f"The picture was seen as {names}: cells were altered in the picture itself, so in both at once."


def _plain(value: Any) -> Any:
    """Tuples as lists, also inside: what a saved result gives back."""
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value
