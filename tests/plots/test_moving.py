"""The moving picture: the question is typed, each word stands beside its own map, and the README's is what the command writes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_lab.errors import OptionError
from llava_lab.plots import moving as module
from llava_lab.plots.moving import moving_words
from llava_lab.plots.sheet import MARGIN, fit, overlay, range_over
from llava_lab.results import Target
from tests.support.widget_examples import make_relevance, make_run, spots

ROOT = Path(__file__).resolve().parents[2]
RUN = make_run("The car is red .")
REL = make_relevance(RUN, np.stack([spots(RUN)[i % 5] for i in range(5)]))

Frames = list[tuple[np.ndarray, int]]


@pytest.fixture(scope="module")
def moving() -> Frames:
    return frames(moving_words(RUN, REL))


def frames(data: bytes) -> Frames:
    """Each frame's pixels (height, width, 3), and its milliseconds."""
    found = []
    with Image.open(io.BytesIO(data)) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            found.append((np.asarray(image.convert("RGB"), np.int16), image.info["duration"]))
    return found


def test_each_word_stands_beside_its_own_map_and_a_full_stop_has_none(moving: Frames) -> None:
    held = [pixels for pixels, milliseconds in moving if milliseconds >= module.HELD]
    assert len(held) == 1 + 4  # the question, and four words
    (width, height), scale = fit(RUN, module.SIDE), range_over([REL.values])
    for index, pixels in enumerate(held[1:]):
        there = pixels[MARGIN : MARGIN + height, MARGIN : MARGIN + width]
        off = [np.abs(there - overlay(RUN, values, scale, (width, height))).mean() for values in REL.drawn[:4]]
        assert int(np.argmin(off)) == index, off
        assert off[index] < 4, off  # 256 colours
    written = [(pixels[: MARGIN + 100, MARGIN + width + MARGIN :].min(-1) < 100).sum() for pixels in held]
    assert written == sorted(written)  # more is said from word to word
    assert len(set(written)) == len(written)


def test_the_question_is_typed_before_anything_is_said_and_the_end_is_held_longest(moving: Frames) -> None:
    assert [milliseconds for _, milliseconds in moving].index(module.HELD) == module.TYPING
    assert max(milliseconds for _, milliseconds in moving) == moving[-1][1] == module.LAST
    assert all(pixels.shape[1] == module.ACROSS for pixels, _ in moving)


@pytest.mark.long
def test_an_answer_or_a_contrast_stands_beside_the_whole_answer() -> None:
    word = RUN.target(RUN.words[3])
    contrast = Target("contrast", "red, not blue", word.positions, word.token_ids, (7,))
    one = make_relevance(RUN, spots(RUN)[:1], targets=(contrast,))
    every = frames(moving_words(RUN, one))
    assert len(every) == module.TYPING + 1 + module.FADING + 1
    right = np.s_[: MARGIN + 100, MARGIN + module.SIDE + MARGIN :]
    said = [(pixels[right].min(-1) < 100).sum() for pixels, _ in every]
    assert said[module.TYPING + 1] > 1.5 * said[module.TYPING]
    assert said[-1] == pytest.approx(said[module.TYPING + 1], rel=0.02)  # all of it at once; 256 colours differ at edges


def test_the_map_of_another_run_is_refused() -> None:
    with pytest.raises(OptionError, match="expected a map of this run"):
        moving_words(make_run(grid=4), REL)


def test_the_readme_s_picture_is_small_moves_and_names_the_command_that_made_it() -> None:
    path = ROOT / ".github" / "asking.gif"
    assert path.stat().st_size < 1_500_000
    every = frames(path.read_bytes())
    assert sum(milliseconds >= module.HELD for _, milliseconds in every) == 1 + 4  # "The car is red."
    assert "(.github/asking.gif)" in (ROOT / "README.md").read_text("utf-8")
    told = " ".join((module.__doc__ or "").split())
    assert "`llava-lab explain notebooks/images/red-car-and-fish.png" in told
    assert "--out .github/asking.gif`" in told
