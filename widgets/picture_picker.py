"""PicturePicker: a picture from a gallery, from a file, dropped or pasted; and CodeBox: lines of code with a button to copy them.

Both are parts of `widgets.explore`. What the page sends is a stranger's file until it was read: its kind, its size and its number
of pixels are checked before anything is drawn.

    PicturePicker([("a car", picture)], on_pick=lambda name, picture: print(name, picture.shape))
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import traitlets
from PIL import Image

from llava_lab.checks import entry
from llava_lab.errors import PictureError
from widgets.base import LabWidget
from widgets.pack import image_bytes

LONGEST = 1344  # pixels of the longer side that is sent
MOST_BYTES = 8_000_000
KINDS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
THUMB = 144  # pixels

Named = tuple[str, np.ndarray]


class PicturePicker(LabWidget):
    """`gallery` holds names and pictures, uint8 (height, width, 3). `on_pick` is called with the name and picture of a choice.

    >>> picker = PicturePicker([("blue car", picture)], on_pick=print)
    """

    render, script, sheets = "renderPicker", "picker.js", ("base.css", "picker.css")

    # the file that was chosen last, as the page made it; what comes from a page is a view of memory, which is made bytes here
    picture = traitlets.CBytes().tag(sync=True)
    name = traitlets.Unicode().tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)  # of the gallery; -1: a file, or nothing yet
    problem = traitlets.Unicode().tag(sync=True)  # what was wrong with the last file
    selected = traitlets.List().tag(sync=True)
    pointed = traitlets.Int(-1).tag(sync=True)

    @entry
    def __init__(self, gallery: Sequence[Named] = (), *, on_pick: Callable[[str, np.ndarray], Any]) -> None:
        self.gallery, self.on_pick = list(gallery), on_pick
        shown = [{"name": name, "image": _data_url(picture)} for name, picture in self.gallery]
        super().__init__(spec={"gallery": shown, "longest": LONGEST, "kinds": list(KINDS.values())})
        self.observe(self._chose, "chosen")
        self.observe(self._sent, "picture")

    def _chose(self, change: dict[str, Any]) -> None:
        if 0 <= change["new"] < len(self.gallery):
            self.on_pick(*self.gallery[change["new"]])

    def _sent(self, change: dict[str, Any]) -> None:
        self.problem = ""
        if change["new"]:
            try:
                self.on_pick(self.name, read_upload(bytes(change["new"])))
            except ValueError as error:  # the page is where the reader is looking
                self.problem = str(error)

    def draw_png(self) -> bytes:
        """The gallery, side by side."""
        sheet = Image.new("RGB", (960, THUMB + 32), "white")
        for place, (_, picture) in enumerate(self.gallery[:6]):
            sheet.paste(_thumb(picture), (16 + place * (THUMB + 12), 16))
        return image_bytes(sheet)

    def __repr__(self) -> str:
        return f"PicturePicker({', '.join(name for name, _ in self.gallery) or 'no gallery'})"


class CodeBox(LabWidget):
    """Lines of code and a button that copies them."""

    render, script, sheets = "renderCode", "picker.js", ("base.css", "picker.css")

    code = traitlets.Unicode().tag(sync=True)
    selected = traitlets.List().tag(sync=True)
    pointed = traitlets.Int(-1).tag(sync=True)

    @entry
    def __init__(self, code: str = "") -> None:
        super().__init__(code=code)

    def draw_png(self) -> bytes:
        """An empty strip: the lines are the widget's text."""
        return image_bytes(Image.new("RGB", (960, 8), "white"))

    def __repr__(self) -> str:
        return f"CodeBox({self.code!r})"


def read_upload(raw: bytes) -> np.ndarray:
    """A file from the page as uint8 (height, width, 3). Raises PictureError, one line, for anything that is no small picture."""
    if len(raw) > MOST_BYTES:
        raise PictureError(f"the picture has {len(raw) / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f} MB; choose a smaller one")
    try:
        with Image.open(io.BytesIO(raw), formats=list(KINDS)) as image:
            if max(image.size) > 2 * LONGEST:
                raise PictureError(f"the picture is {image.size[0]}x{image.size[1]}, more than {2 * LONGEST} pixels a side")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"this file cannot be read as a picture ({type(error).__name__})") from None


def _thumb(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((THUMB, THUMB), Image.Resampling.LANCZOS)


def _data_url(picture: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(image_bytes(_thumb(picture), optimize=True)).decode('ascii')}"
