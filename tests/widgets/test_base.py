"""What every widget keeps, as Python sees it: one module from plain scripts, a still that stays the same, a page of its own."""

from __future__ import annotations

import base64
import doctest
import importlib
import io
import json
import re

import pytest
from PIL import Image

import llava_lab as ll
from llava_lab.errors import OptionError
from tests.support.all_widgets import ATTACK, EVERY
from tests.support.widget_examples import car_picture
from widgets.base import JS, LabWidget, RunWidget, bundle, embed, sources, styles
from widgets.picture_picker import CodeBox, PicturePicker

SCRIPTS = sorted(JS.rglob("*.js"))
every_widget = pytest.mark.parametrize("name", EVERY)


@every_widget
def test_saved_as_text_a_small_still_that_stays_the_same_and_a_view(name: str) -> None:
    widget = EVERY[name]()
    data, _ = widget._repr_mimebundle_()  # type: ignore[misc]
    assert data["text/plain"] == repr(widget)
    assert repr(widget).startswith(f"{name}(")
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    raw = base64.b64decode(data["image/png"])
    assert Image.open(io.BytesIO(raw)).size[0] == 960
    assert len(raw) < 200_000
    assert raw == EVERY[name]().draw_png()


@every_widget
def test_a_misspelt_option_is_an_error(name: str) -> None:
    with pytest.raises(OptionError, match=rf"{name} has no option 'bogus'; its options are"):
        EVERY[name](bogus=1)


@every_widget
def test_a_page_of_its_own_needs_nothing_else(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    widget = EVERY[name]()
    if not isinstance(widget, RunWidget):
        return
    text = widget.to_html(tmp_path / "page.html", title=ATTACK)
    assert (tmp_path / "page.html").read_text("utf-8") == text
    assert widget.render in text
    assert "http" not in text.replace("http-equiv", "")
    assert ATTACK not in text


def test_embedded_json_cannot_close_its_script() -> None:
    value = {"a": ATTACK, "b": "\u2028 é"}
    assert "<" not in embed(value)
    assert json.loads(embed(value)) == value


def test_a_widget_without_a_still_picture_is_a_bug_that_says_so() -> None:
    with pytest.raises(TypeError, match="LabWidget must draw its own still picture"):
        LabWidget().draw_png()


def test_joined_modules_share_one_scope_without_a_name_defined_twice() -> None:
    shown: list[LabWidget] = [*(make() for make in EVERY.values()), PicturePicker([], on_pick=print), CodeBox()]
    used = [*dict.fromkeys(widget.script for widget in shown), "shared/page.js"]
    assert sorted(sources(*used)) == SCRIPTS
    source = bundle(*used)  # a report has them all in one module
    names = re.findall(r"^(?:export )?(?:async )?(?:function|class|const|let) (\w+)", source, re.MULTILINE)
    assert len(names) == len(set(names))
    assert not re.search(r"^import ", source, re.MULTILINE)
    for widget in shown:
        assert widget._esm.count("export default") == 1
        assert f"export const {widget.render} = shows(" in widget._esm


def test_modules_state_their_types() -> None:
    for path in SCRIPTS:
        text = path.read_text("utf-8")
        assert text.startswith("// @ts-check\n/**"), path.name


def test_every_name_a_module_imports_is_exported_by_the_file_it_names() -> None:
    for path in SCRIPTS:
        for names, file in re.findall(r'^import \{([^}]*)\} from "(\.[\w./]+\.js)";', path.read_text("utf-8"), re.MULTILINE):
            source = (path.parent / file).read_text("utf-8")
            exported = set(re.findall(r"^export (?:function|class|const) (\w+)", source, re.MULTILINE))
            assert {name.strip() for name in names.split(",") if name.strip()} <= exported, f"{path.name} from {file}"


def test_css_classes_carry_the_prefix() -> None:
    sheets = styles(*sorted(path.name for path in JS.parent.glob("*.css")))
    classes = re.findall(r"\.([a-z][\w-]*)", re.sub(r"\d\.\d+|/\*.*?\*/", "", sheets, flags=re.DOTALL))
    assert [name for name in classes if not name.startswith("lab-")] == []


def test_examples_of_the_docstrings_run() -> None:
    lab = ll.load("tiny")
    run = lab.ask(car_picture(), "What color is the car?")
    for make in EVERY.values():
        module = importlib.import_module(type(make()).__module__)
        outcome = doctest.testmod(module, extraglobs={"ll": ll, "lab": lab, "run": run})
        assert outcome.attempted >= 2
        assert outcome.failed == 0
