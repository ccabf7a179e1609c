"""A page that holds a whole small model: its graphs, its words, the drawn world, and the script that runs them.

    built = write_page(ll.load("tiny"), "demo.html")
    print(built.describe())

Before anything is written the graphs are asked beside the model itself (`graphs.agreement`); a page whose answers differ is not
written. What shows the page is found by the entry-point group `GROUP`, since this package never imports the one that shows.

What runs the graphs in a browser is onnxruntime-web, one version of it by its hash, from npm's own client into a cache:

    parts = runtime()  # {"script": "...", "wasm": b"...", "licence": "..."}

Two of the package's files are used: the build for WebAssembly alone with its loader inside, and the module it loads. One thread:
a page from disk is not isolated from others, and has no shared memory. The script's `export` is turned into one object, since
the page is one module whose hash its policy names; that a script of the right version has it is checked.

Source: npm, onnxruntime-web (MIT, Microsoft Corporation).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

import llava_lab
from llava_lab.attribution import METHODS
from llava_lab.bridge import offered
from llava_lab.checks import entry
from llava_lab.errors import DataError, LabError, OptionError, WriteError
from llava_lab.models.scope import rules
from llava_lab.models.text import build_prompt
from llava_lab.page.graphs import LIMIT, TOLERANCE, Say, agreement, check_model, engine, export
from llava_lab.results import whole_file
from llava_lab.worlds.drawing import COLORS, INK, KINDS, OVERSAMPLE, PAPERS, WHITE, Pen
from llava_lab.worlds.scenes import GAP, MAX_THINGS, SIZE, scene

if TYPE_CHECKING:
    from llava_lab.models import Lab

GROUP, OWN = "llava_lab.page", "widgets.demo:write"
HERE = Path(__file__).parent
SCRIPTS, SHEETS = (HERE / "js" / "demo.js",), (HERE / "js" / "demo.css",)
SIDES = {"small": 60, "large": 99}  # the middle of each range that scenes draw from
FINE = 198  # side at which things are shown to people: twice the large
MARGIN = 2  # pixels of paper around everything, as scenes leave
FIRST = 3  # things in the scene that the page opens with: enough to ask about, and room for one more
CODE = (200, 100, 50)  # a colour that is told apart from its dark edge, ink and white
DARK = 0.62  # of a colour at its edge, as `Pen` has it
MAPS = ("rollout", "attention", "token_knockout", "occlusion", "random")
WARNING = (
    "Whatever else it is shown or asked it answers too, in sentences as fluent and as sure, so read them as those of a small "
    "model that has seen nothing but drawings."
)


@dataclass(frozen=True)
class Built:
    """A page as it was written, and how it was proved."""

    path: str
    megabytes: float
    questions: int  # asked of the graphs and of the model
    tokens: int
    logits: float  # largest difference of a logit

    def describe(self) -> str:
        return (
            f"{self.path}: {self.megabytes:.1f} MB; {self.questions} questions gave the model's own {self.tokens} tokens, "
            f"logits within {self.logits:.1g}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@entry
def write_page(lab: Lab, path: str | os.PathLike, *, package: str | os.PathLike | None = None) -> Built:
    """Write `lab` as one HTML file that needs nothing else. About a minute.

    `package` is onnxruntime-web's package file; None takes the cache's, fetched once by npm. Raises OptionError for a model that
    a page cannot hold, LabError where the graphs do not answer as the model does or something that builds them is missing.
    """
    check_model(lab)
    if lab.prompt != "llava-1.5":
        raise OptionError(f"a page asks in the form 'llava-1.5', and {lab.name!r} asks in {lab.prompt!r}; use `llava-lab app`")
    write, running = offered(GROUP, OWN, "write a page"), runtime(None if package is None else Path(package))
    graphs = export(lab)
    proof = agreement(lab, engine(graphs))
    if not proof.same or proof.logits > TOLERANCE:
        raise LabError(
            f"expected the graphs to answer as the model does, got {'the same' if proof.same else 'other'} tokens and logits off "
            f"by {proof.logits:.2g} of {TOLERANCE:g} allowed; nothing was written"
        )
    try:
        written = write(
            path,
            title=f"Ask {lab.name}",
            spec=spec(lab),
            parts={"shares": shares(), "wasm": running["wasm"], **graphs},
            runtime=running["script"],
            scripts=SCRIPTS,
            sheets=SHEETS,
            licence=running["licence"],
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    except OSError as error:
        raise WriteError.of(path, error) from None
    return Built(str(written), os.path.getsize(written) / 1e6, proof.questions, proof.tokens, proof.logits)


def spec(lab: Lab) -> dict[str, Any]:
    """What the page is told of the model, as JSON."""
    layers, _, groups, head = Say(lab).kept
    images = lab.processor.image_processor
    shape = {
        "layers": layers,
        "groups": groups,
        "head": head,
        "width": Say(lab).width,
        "limit": LIMIT,
        "vocabulary": lab.model.config.text_config.vocab_size,
        "eos": sorted(lab.eos_ids),
        "image": lab.image_id,
        "cols": lab.grid[1],
        "square": {
            "size": lab.preprocessing.size,
            "color": list(lab.preprocessing.color),
            "mean": list(images.image_mean),
            "std": list(images.image_std),
        },
    }
    known = sorted(lab.scope.words) if lab.scope is not None else []
    return {
        "name": lab.name,
        "knows": lab.card.knows,
        "warning": WARNING,
        "words": words(lab),
        "shape": shape,
        "world": world(),
        "truths": {name: METHODS[name].truth for name in MAPS},
        "reading": {**rules(), "known": known} if known else None,
        "made": f"llava-lab {llava_lab.__version__}, weights {lab.fingerprint}, {lab.card.parameters:,} parameters in 16 bits, "
        f"run by onnxruntime-web {VERSION} on one thread. A map shows what its method measures, not all that the model did.",
    }


def words(lab: Lab) -> dict[str, Any]:
    """The tokenizer and the prompt, as ``tokenizer.js`` reads them. Raises OptionError for another kind than byte-level pairs."""
    tokenizer = json.loads(lab.tokenizer.backend_tokenizer.to_str())
    model, before = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    if model["type"] != "BPE" or before.get("type") != "ByteLevel" or before["add_prefix_space"] or tokenizer["normalizer"]:
        raise OptionError(f"a page reads byte-level pairs without a normaliser, and {lab.name!r} has another kind of tokenizer")
    mark = "\x00"
    start, end = build_prompt(mark, lab.prompt).split(mark)
    return {
        "vocabulary": model["vocab"],
        "merges": model["merges"],
        "special": {token["content"]: token["id"] for token in tokenizer["added_tokens"]},
        "start": lab.tokenizer.bos_token_id,
        "before": start,
        "after": end,
        "image": lab.image_id,
        "patches": lab.grid[0] * lab.grid[1],
    }


def world() -> dict[str, Any]:
    """The drawn world's rules and colours, and the scene the page opens with."""
    scenes = (scene("lesson", index).things for index in count())
    things = next(things for things in scenes if len({thing.kind for thing in things}) == len(things) == FIRST)
    first = [
        {"kind": t.kind, "color": t.color, "size": t.size, "x": t.x * SIZE, "y": t.y * SIZE, "mirrored": t.mirrored}
        for t in things
    ]
    return {
        "side": SIZE,
        "gap": GAP,
        "most": MAX_THINGS,
        "margin": MARGIN,
        "kinds": list(KINDS),
        "sizes": SIDES,
        "fine": FINE,
        "parts": OVERSAMPLE**2,
        "colors": COLORS,
        "dark": DARK,
        "ink": INK,
        "white": WHITE,
        "papers": PAPERS,
        "first": {"things": first, "paper": 0},
    }


def shares() -> bytes:
    """Of every kind at every side: how many of a pixel's fine points have its colour, its dark edge, ink and white."""
    dark = tuple(round(part * DARK) for part in CODE)
    parts = []
    for draw in KINDS.values():
        for side in (*SIDES.values(), FINE):
            pen = Pen(side * OVERSAMPLE, CODE)
            draw(pen)
            points = np.asarray(pen.image)
            inked = points[:, :, 3] > 0
            masks = [(points[:, :, :3] == color).all(2) & inked for color in (CODE, dark, INK, WHITE)]
            assert (np.sum(masks, 0) == inked).all(), "a point of a drawing has a colour of its own"
            counted = [mask.reshape(side, OVERSAMPLE, side, OVERSAMPLE).sum((1, 3)) for mask in masks]
            parts.append(np.stack(counted, -1).astype(np.uint8))
    return b"".join(part.tobytes() for part in parts)


# -- the runtime ----------------------------------------------------------------------------

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca590a5cdc57bb2f35"
    "ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
SCRIPT, WASM = "package/dist/ort.wasm.bundle.min.mjs", "package/dist/ort-wasm-simd-threaded.wasm"
EXPORT = re.compile(r"export\{([^{}]*)\};\s*(?://# sourceMappingURL=\S+\s*)?$")
SECONDS = 600  # 33 MB over a slow line


class Runtime(TypedDict):
    """The files a page needs."""

    script: str  # a statement that defines `ort`
    wasm: bytes
    licence: str


def cache_folder() -> Path:
    """Where the package is kept: `LLAVA_LAB_CACHE`, else the user's own cache."""
    own = os.environ.get("LLAVA_LAB_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-lab"


def tarball() -> Path:
    """The package's file in the cache, fetched by ``npm pack`` where it is not there yet. Raises LabError without npm."""
    path = cache_folder() / f"{PACKAGE}-{VERSION}.tgz"
    if path.is_file():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise LabError(
            f"the page needs {PACKAGE} {VERSION} once, and there is no npm to fetch it; install npm, or put its package file "
            f"at {path}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", temporary]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LabError(f"npm could not fetch {PACKAGE} {VERSION} ({error}); try again when the network is there") from None
        fetched = Path(temporary) / path.name
        if done.returncode != 0 or not fetched.is_file():
            last = (done.stderr.strip().splitlines() or ["it wrote no file"])[-1]
            raise LabError(f"npm could not fetch {PACKAGE} {VERSION} ({last}); try again when the network is there")
        check_package(fetched)
        with whole_file(path) as file:
            shutil.copyfile(fetched, file)
    return path


def check_package(path: Path) -> None:
    """Raises DataError unless the file is the very package that was tested."""
    found = hashlib.sha512(path.read_bytes()).hexdigest()
    if found != SHA512:
        raise DataError(f"{path} is not {PACKAGE} {VERSION}: its sha512 begins {found[:16]}, expected {SHA512[:16]}; remove it")


def runtime(path: Path | None = None) -> Runtime:
    """The runtime's parts from the package at `path`, None the cache's. Raises DataError for any other file."""
    path = path or tarball()
    check_package(path)
    with tarfile.open(path) as package:
        script, wasm = (_member(package, name) for name in (SCRIPT, WASM))
    licence = (Path(__file__).parent / "onnxruntime-web-licence.txt").read_text("utf-8")
    return {"script": as_object(script.decode("utf-8")), "wasm": wasm, "licence": licence}


def as_object(module: str) -> str:
    """An ES module's text as a statement that defines `ort` with all it exports."""
    found = EXPORT.search(module)
    if found is None:
        raise DataError(f"{SCRIPT} does not end with its exports; expected {PACKAGE} {VERSION}")
    pairs = [pair.split(" as ") for pair in found[1].split(",")]
    exported = ", ".join(f"{shown}: {own}" for own, shown in pairs if shown != "default")
    return f"const ort = (() => {{\n{module[: found.start()]}\nreturn {{ {exported} }};\n}})();\n"


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None, f"{name} is a folder"
    return file.read()
