"""The asking as a short moving picture: the question is typed, and with each word of the answer comes its map.

The README's was made by ``llava-lab explain notebooks/images/red-car-and-fish.png "What color is the car?" --method relevancy
--out .github/asking.gif``. It is a GIF, which every browser and code host plays, drawn on the page of the stills.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from llava_lab.errors import OptionError
from llava_lab.plots.palette import COLORS, INK, ORANGE, SOFT
from llava_lab.plots.sheet import MARGIN, Scale, Sheet, fit, overlay, plain_style, range_over
from llava_lab.results import Relevance, Run, Target
from llava_lab.results.table import NEGLIGIBLE

ACROSS = 720  # units of the page that are shown
SIDE, LOWEST = 300, 240  # units; longer side of the picture, and how high the page is at least
TYPING, FADING = 10, 3  # frames of the question, and of one map turning into the next
QUICK, HELD, LAST = 70, 1000, 2200  # milliseconds of such a frame, of a word's map, and of the whole answer

Frame = tuple[Image.Image, int]  # and its milliseconds


@plain_style
def moving_words(run: Run, rel: Relevance) -> bytes:
    """A GIF, 720 pixels wide and played over and over: the question, then word after word with its map, on one colour scale.

    A full stop answers nothing and is left out. Of what is no word, an answer or a contrast, the whole answer stands beside it.
    Raises OptionError where the map is of another run.

    >>> from llava_lab.plots.moving import moving_words
    >>> moving_words(run, ll.attribute(lab, run, method="attention", target="words"))[:6]
    b'GIF89a'
    """
    if rel.map != run.map or rel.fingerprint != run.fingerprint:
        raise OptionError("expected a map of this run, got one made for another picture or by another checkpoint")
    frames = list(_frames(run, rel))
    images = [image.quantize(COLORS, kmeans=1, dither=Image.Dither.NONE) for image, _ in frames]
    durations = [milliseconds for _, milliseconds in frames]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)
    return buffer.getvalue()


def _frames(run: Run, rel: Relevance) -> Iterator[Frame]:
    size, scale = fit(run, SIDE), range_over([rel.values])
    seen = np.asarray(Image.fromarray(run.picture).resize(size, Image.Resampling.LANCZOS))
    for step in range(TYPING + 1):
        typed = run.question[: math.ceil(len(run.question) * step / TYPING)]
        yield _page(run, rel, seen, scale, typed), HELD if step == TYPING else QUICK
    places = _places(run, rel.targets)
    telling = [i for i, target in enumerate(rel.targets) if any(map(str.isalnum, target.text))] or list(range(len(rel.targets)))
    for index in telling:
        # what stands behind the last word is said with it
        said = (*places[index], len(run.answer) if index == telling[-1] else places[index][1])
        drawn, before = overlay(run, rel.drawn[index], scale, size), seen
        for step in range(1, FADING + 1):
            part = step / (FADING + 1)
            seen = (before * (1 - part) + drawn * part).round().astype(np.uint8)
            yield _page(run, rel, seen, scale, run.question, rel.targets[index], said), QUICK
        seen = drawn
        yield _page(run, rel, seen, scale, run.question, rel.targets[index], said), LAST if index == telling[-1] else HELD


def _places(run: Run, targets: tuple[Target, ...]) -> list[tuple[int, int]]:
    """Where each target begins and ends in the answer, in letters without spaces; what is no word of it is all of it."""
    answer = "".join(run.answer.split())
    places, at = {}, 0
    for target in run.word_targets():
        word = "".join(target.text.split())
        found = answer.find(word, at)
        if found >= 0:
            at = found + len(word)
            places[target] = (found, at)
    return [places.get(target, (0, len(answer))) for target in targets]


def _page(
    run: Run,
    rel: Relevance,
    pixels: np.ndarray,
    scale: Scale,
    question: str,
    target: Target | None = None,
    place: tuple[int, int, int] = (0, 0, 0),
) -> Image.Image:
    """One frame: the picture with what lies over it, and beside it what was asked, and said up to the last of `place`.

    The first two of `place` are where the target begins and ends.
    """
    sheet = Sheet()
    height, width = pixels.shape[:2]
    sheet.image(pixels, MARGIN, MARGIN, width, height)
    left, bottom = MARGIN + width + 2 * MARGIN, float(MARGIN + max(height, LOWEST))
    room = ACROSS - MARGIN - left
    sheet.write(left, MARGIN, question, 22, SOFT, room=room)
    said, top = 0, MARGIN + 44
    for line in sheet.wrapped(run.answer, 34, room):
        before, until, shown = (_beginning(line, letters - said) for letters in place)
        sheet.write(left, top, shown, 34, INK, room=room)
        x, end = sheet.measure(before, 34), sheet.measure(until.rstrip(), 34)
        if target is not None and target.kind == "word" and end > x:
            sheet.box(left + x, top + 44, end - x, 4, facecolor=ORANGE)
        said, top = said + len("".join(line.split())), top + 56
    if target is not None:
        text = f'where "{target.text}" came from' if target.kind == "word" else f"{target.kind}: {target.text}"
        nothing = rel.noise_floor[rel.targets.index(target)] > 0 and not rel.drawn[rel.targets.index(target)].any()
        sheet.write(left, bottom - 84, text, 18, INK, room=room, end=f": {NEGLIGIBLE}" if nothing else "")
    sheet.write(
        left, bottom - 50, f"{run.model}, {run.map.rows} × {run.map.cols} patches, map by {rel.method}", 14, SOFT, room=room
    )
    if target is not None:
        sheet.strip(scale, left + 80, bottom - 18)
    sheet.top = bottom
    figure = sheet.done()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :ACROSS, :3])


def _beginning(line: str, count: int) -> str:
    """As much of a line as holds `count` letters that are no spaces, with the spaces before the next."""
    for end in range(len(line)):
        if len("".join(line[: end + 1].split())) > count:
            return line[:end]
    return line
