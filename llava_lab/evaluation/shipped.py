"""What ships already computed: the leaderboard beside a model, and the comparison of connectors; opened in a moment.

A leaderboard is one file in the model's own folder under `llava_lab/assets`, and it speaks about the weights it was
computed on and no others. The comparison of connectors stands beside the two models it ships with. Nothing here
measures anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_lab.errors import DataError
from llava_lab.models.folders import ABLATE, ABLATION, NAMES, SHIP
from llava_lab.results_ablation import Ablation
from llava_lab.scores import Leaderboard

if TYPE_CHECKING:
    from llava_lab.models import Lab

FILE = "leaderboard.npz"
COMPARISON = ABLATION / "ablation.npz"
COMMAND = "llava-lab compare --model {name} --data picturebook --n 200 --methods all --save leaderboard.npz"


def shipped_leaderboard(lab: Lab) -> Leaderboard:
    """The leaderboard of the loaded model, as it ships with this project.

    Raises DataError when none ships with it, or when it was computed on other weights than the loaded ones;
    the message holds the command that computes one.
    """
    path = NAMES[lab.name] / FILE if lab.name in NAMES else None
    again = f"compute one with: {COMMAND.format(name=lab.name)}"
    if path is None or not path.is_file():
        raise DataError(f"no leaderboard ships with {lab.name!r}; {again}")
    board = Leaderboard.load(path)
    made_by = board.about.get("fingerprint")
    if made_by != lab.fingerprint:
        raise DataError(f"the shipped leaderboard is of weights {made_by}, and {lab.name!r} now has {lab.fingerprint}; {again}")
    return board


def shipped_ablation() -> Ablation:
    """The comparison of connectors as it ships: linear, MLP and their controls, every answer of every seed.

    The models of its first seed are ``load("tiny-linear")`` and ``load("tiny-mlp")``. Raises DataError with the command
    that makes one when none ships.
    """
    if not COMPARISON.is_file():
        raise DataError(f"no comparison of connectors ships at {COMPARISON}; make one with: {ABLATE}; then {SHIP}")
    return Ablation.load(COMPARISON)
