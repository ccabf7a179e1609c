"""Ask without code: `explore` shows a widget to pick a picture, ask about it and see maps; `Session` is its model's side.

    ll.explore()  # the last line of a cell

The widget is in the package that shows and is found by an entry point (`llava_lab.bridge`); it is handed a `Session` and calls
nothing else of this package. What is asked there can be had as code, line by line the same.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_lab.attribution.registry import METHODS, attribute, refuse_unable
from llava_lab.bridge import offered
from llava_lab.checks import entry
from llava_lab.errors import OptionError
from llava_lab.interventions import ask_without
from llava_lab.models import load
from llava_lab.models.card import NOT_STATED
from llava_lab.models.pictures import PictureLike, read_picture
from llava_lab.worlds import picturebook

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.results import Relevance, Run

GROUP, OWN = "llava_lab.explore", "widgets.explore:show"
SCENES = (0, 1, 2, 3, 5)  # of the picture book's lesson split, in the gallery
PHOTOGRAPHS = ("chelsea", "coffee", "rocket")  # of scikit-image, where it is installed
SHOWN = ("rollout", "attention", "occlusion", "relevancy", "gradcam", "random")  # methods offered first
CHOSEN = ("rollout", "random")  # one map, and the control beside it


@dataclass(frozen=True)
class Shown:
    """A picture that can be asked about: how it is called, what it shows, how code gets it, what to ask first."""

    name: str
    picture: np.ndarray  # uint8 (height, width, 3)
    code: str
    questions: tuple[str, ...] = ("What is in the picture?", "Describe the picture.")


class Session:
    """One model to ask and to explain, for `explore`; it keeps nothing of what was asked.

    >>> from llava_lab.session import Session
    >>> Session(lab).ask(picture, "What color is the car?").answer
    'The car is red.'
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.name = lab.name
        self.knows = "" if lab.card.knows == NOT_STATED else lab.card.knows
        self.methods = {name: method.truth for name, method in METHODS.items() if _able(lab, name)}
        self.first = tuple(name for name in SHOWN if name in self.methods)
        self.chosen = tuple(name for name in CHOSEN if name in self.methods)

    def gallery(self) -> list[Shown]:
        """Drawn pictures and photographs; those that the model was made for stand first (`photo` was made for no drawn ones)."""
        drawn = []
        for index in SCENES:
            scene = picturebook.scene("lesson", index)
            things = ", ".join(f"{scene.things[i].color} {scene.things[i].kind}" for i in scene.left_to_right)
            asked = picturebook.ask_about(scene, np.random.default_rng(index), 3)
            code = f'picturebook.scene("lesson", {index}).picture()'
            drawn.append(Shown(things, np.asarray(scene.picture()), code, tuple(question.text for question in asked)))
        # where it was measured which pictures a model was trained on, they were drawn ones
        measured = self.lab.scope is not None and self.lab.scope.pictures is not None
        return drawn + _photographs() if measured else _photographs() + drawn

    def given(self, picture: PictureLike) -> Shown:
        """A picture of the user's."""
        name = Path(picture).name if isinstance(picture, str | os.PathLike) else "your picture"
        code = repr(str(picture)) if isinstance(picture, str | os.PathLike) else "...  # your picture"
        return Shown(name, read_picture(picture), code)

    def uploaded(self, name: str, picture: np.ndarray) -> Shown:
        """A file chosen in the page, which the browser does not say the place of."""
        return Shown(name, picture, f"{name!r}  # the file you chose")

    def ask(
        self,
        picture: np.ndarray,
        question: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        on_token: Callable[[str], None] | None = None,
    ) -> Run:
        """The answer to a question with what was said before it. `on_token` may raise KeyboardInterrupt to end it early."""
        return self.lab.ask(picture, question, history=list(history), on_token=on_token)

    def explain(self, run: Run, method: str) -> Relevance:
        """One map for each word of the answer."""
        return attribute(self.lab, run, method=method, target="words")

    def without(self, run: Run, patches: Sequence[tuple[int, int]], history: Sequence[tuple[str, str]] = ()) -> Run:
        """The same question with some patches covered."""
        return ask_without(self.lab, run, patches, history=list(history))

    def code(
        self,
        shown: Shown,
        question: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        methods: Sequence[str] = (),
        patches: Any = (),
    ) -> str:
        """What was done in the widget as lines of Python."""
        drawn, skimage = "picturebook." in shown.code, "data." in shown.code
        lines = ["import llava_lab as ll"]
        lines += ["from llava_lab.worlds import picturebook"] * drawn + ["from skimage import data"] * skimage
        lines += ["from widgets import PatchExplorer"] * bool(methods)
        lines += ["", f"lab = ll.load({self.name!r})", f"picture = {shown.code}"]
        told = f", history={list(history)!r}" if history else ""
        lines += [f"run = lab.ask(picture, {question!r}{told})", "print(run.answer, *run.notes)"]
        if methods:
            lines += [f"methods = {list(methods)!r}"]
            lines += ['maps = {name: ll.attribute(lab, run, method=name, target="words") for name in methods}']
        if patches:
            lines += [f"ll.ask_without(lab, run, {list(patches)!r}{told}).answer"]
        return "\n".join([*lines, *(["PatchExplorer(run, maps)"] * bool(methods))])


@entry
def explore(picture: PictureLike | None = None, model: Any = "tiny") -> Any:
    """A widget to ask without code: pick or drop a picture, type questions, see which patches each word came from.

    `picture` is anything that `lab.ask` takes for one, None begins with the gallery; `model` is a name that `load` knows, or a
    loaded lab. "Copy the code of this" gives what was done as lines of Python. The same page without a notebook is
    ``llava-lab app``. Needs the extra ``lab``; raises LabError where nothing can show it, and what `load` raises.

    >>> ll.explore(picture, lab)
    Explore('tiny', your picture)
    """
    lab = model if hasattr(model, "ask") else load(model)
    if not hasattr(lab, "card"):
        raise OptionError(
            f"explore looks inside the model, and {getattr(lab, 'name', 'this one')!r} is closed; ask it with lab.ask"
        )
    session = Session(lab)
    first = None if picture is None else session.given(picture)
    return offered(GROUP, OWN, "show explore")(session, first)


def _able(lab: Lab, name: str) -> bool:
    try:
        refuse_unable(lab, METHODS[name])
    except ValueError:
        return False
    return True


def _photographs() -> list[Shown]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        return []
    folder, found = Path(package.origin).parent / "data", []
    for name in PHOTOGRAPHS:
        files = [folder / f"{name}.{ending}" for ending in ("png", "jpg")]
        found += [Shown(f"{name} (photo)", read_picture(file), f"data.{name}()") for file in files if file.is_file()]
    return found
