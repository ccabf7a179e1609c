"""A stranger's checkpoint is refused in one line, soon and in little memory, whatever its files hold."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_lab.errors import CheckpointError
from llava_lab.models import load
from llava_lab.models.card import readme_head
from llava_lab.models.formats import foreign, smol
from llava_lab.models.text import chat_messages
from tests.support.checkpoints import V1_TEMPLATE
from tests.support.damaged import VALUES
from tests.support.families import family
from tests.support.little_language import llama, write_gguf

SPEND = 1  # seconds of computing another process has here


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "SECONDS", SPEND)


def refusal(folder: Path) -> str:
    """The one line that loading ends in; "" where it loads."""
    try:
        load(folder)
    except CheckpointError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 900
        return line
    return ""


def put(path: Path, *keys: str, value: Any) -> None:
    data = json.loads(path.read_text())
    inside = data
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    path.write_text(json.dumps(data))


# -- sizes ----------------------------------------------------------------------------------

SIZES: list[tuple[str, Any, str]] = [
    ("text_config.num_hidden_layers", 1_000_000, "the weights are only"),
    ("text_config.num_hidden_layers", 10**12, "which no model has"),
    ("text_config.num_hidden_layers", 10**400, "which no model has"),
    ("vision_config.num_hidden_layers", 10_000, "the weights are only"),
    ("text_config.vocab_size", 10**9, "describes a model of"),
    ("text_config.hidden_size", 2**20, "describe"),
    ("text_config.intermediate_size", 10**9, "describes a model of"),
    ("text_config.head_dim", 10**8, "describes a model of"),
    ("text_config.num_key_value_heads", 10**8, "describes a model of"),
    ("vision_config.image_size", 10**6, "describes a model of"),
    ("vision_config.patch_size", 0, "describe"),
    ("vision_config.patch_size", -8, "describe"),
    ("vision_config.hidden_size", 10**7, "describe"),
    ("mm_projector_type", "mlp1000000x_gelu", "layers"),
]


@pytest.mark.parametrize(("name", "value", "line"), SIZES, ids=lambda part: str(part)[:40])
def test_absurd_sizes_are_refused_before_anything_is_made(name: str, value: Any, line: str, copy: Path) -> None:
    put(copy / "config.json", *name.split("."), value=value)
    start = time.process_time()
    assert line in refusal(copy)
    assert time.process_time() - start < 5


def test_any_value_anywhere_in_config_json_is_one_line_or_loads(copy: Path) -> None:
    rng, text = np.random.default_rng(0), (copy / "config.json").read_text()
    names: list[tuple[str, ...]] = [("text_config", key) for key in json.loads(text)["text_config"]]
    names += [("vision_config", key) for key in json.loads(text)["vision_config"]] + [(key,) for key in json.loads(text)]
    for number in rng.permutation(len(names))[:40]:
        put(copy / "config.json", *names[number], value=VALUES[rng.integers(len(VALUES))])
        refusal(copy)
        (copy / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("image_mean", [{}, 1, 1], "expected numbers"),
        ("image_std", [0, 1, 1], "expected numbers"),
        ("rescale_factor", "a", "expected numbers"),
        ("image_mean", [0.5, 0.5], "expected one for each colour"),
        ("image_std", [], "expected one for each colour"),
        ("image_std", [0.5] * 4, "expected one for each colour"),
        ("size", {"shortest_edge": 10**30}, "which no model has"),
    ],
)
def test_a_picture_cannot_be_made_of_anything(name: str, value: Any, line: str, copy: Path) -> None:
    put(copy / "processor_config.json", "image_processor", name, value=value)
    assert line in refusal(copy)


# -- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype: torch.dtype, suffix: str, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    weights[name] = weights[name].to(dtype)
    (copy / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(weights, copy / "pytorch_model.bin")
    else:
        save_file(weights, copy / "model.safetensors")
    assert f"no floating-point numbers, for example {name}" in refusal(copy)


def _more_than_stored(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"lm_head.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_more_than_stored, "more than is stored of it"),
        (lambda weights: [weights], "does not hold a dict of named tensors"),
        (lambda weights: weights | {"x": 1}, "does not hold a dict of named tensors"),
        # "is stored of it", or "weights": whether torch reads one without memory at all depends on what else it has loaded
        (lambda weights: weights | {"x": torch.ones(2).to_sparse()}, "more than "),
        (lambda weights: {}, "the weights hold 0"),
    ],
)
def test_a_bin_that_holds_something_else_is_refused(change: Callable[[Any], Any], line: str, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(change(weights), copy / "pytorch_model.bin")
    assert line in refusal(copy)


def test_a_bin_that_unpacks_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with zipfile.ZipFile(copy / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert "packed in a way that torch does not write" in refusal(copy)


# -- files ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md", "model.safetensors", "anything"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_only_plain_files_are_opened(make: Callable[[Path], None], name: str, copy: Path) -> None:
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    assert f"{name} is no regular file" in refusal(copy)


@family(
    "raw",
    [b"[" * 100_000, b"\xff\xfe{\0}\0", b"[]", b"null", b'{"a":' * 50_000, b"", b'{"model_type": ["llava"]}', b"{}"],
    quick=3,
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"])
def test_any_json_file_may_be_damaged(name: str, raw: bytes, copy: Path) -> None:
    (copy / name).write_bytes(raw)
    assert refusal(copy) or name != "config.json"


@pytest.mark.parametrize(
    "text",
    [
        "---" + "\n" * 300_000,
        "---\n" + " " * 300_000,
        ("---\n" + " " * 50 + "- ") * 9000,
        "---\n" + "a: " * 90_000,
        "-" * 300_000,
    ],
)
def test_a_readme_of_white_space_is_read_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    start = time.process_time()
    readme_head(tmp_path)
    assert time.process_time() - start < 1
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model:\n- a/b\n---\n" + text)
    assert readme_head(tmp_path) == {"license": "mit", "base_model": "a/b"}


# -- templates and tokenizers ---------------------------------------------------------------

TEMPLATES = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**11 }}",
    "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% if %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ nothing.at.all }}",
    "{{ messages | nofilter }}",
    "{{ 'a'.center(10**10) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ["a", "list"],
]


@family("template", TEMPLATES, quick=5, ids=lambda template: str(template)[:30])
@pytest.mark.usefixtures("hurried")
def test_templates_that_never_end_or_do_what_they_must_not_are_one_line(template: Any) -> None:
    with pytest.raises(CheckpointError, match="chat template") as told:
        foreign.render(template, messages=chat_messages("What?"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "template",
    [
        V1_TEMPLATE,
        smol.CHAT_TEMPLATE,
        "  {%- for m in messages %}\n    {{- m | tojson }}\n  {% endfor %}\n{{ bos_token }}{{ messages | tojson(indent=1) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}{{ dict(a=1)['a'] }}",
    ],
)
def test_a_template_writes_what_transformers_writes(template: str, tiny_folder: Path) -> None:
    lab = load(tiny_folder)
    lab.processor.chat_template = template
    messages = chat_messages("Is it <b>?", history=[("What é?", "A car.")])
    theirs = lab.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    marks = lab.tokenizer.special_tokens_map
    assert foreign.render(template, messages=messages, add_generation_prompt=True, **marks) == theirs
    assert lab.foreign
    assert not load("tiny").foreign


GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 999}
PAD = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
TOKENIZERS: list[dict[str, Any]] = [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
    {"normalizer": {"type": "Sequence", "normalizers": [GROW] * 5}},
    {"normalizer": {"type": "Nothing"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}},
    {"padding": {"strategy": {"Fixed": 10**10}, **PAD}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}},
    {"model": None},
    {"added_tokens": [{"id": 10**12, "content": "a"}]},
]


@family("change", TOKENIZERS, quick=3, ids=lambda change: str(change)[:50])
@pytest.mark.usefixtures("hurried")
def test_a_tokenizer_that_takes_its_process_down_takes_another(change: dict[str, Any], copy: Path) -> None:
    for name, value in change.items():
        put(copy / "tokenizer.json", name, value=value)
    assert f"the tokenizer in {copy} cannot be loaded" in refusal(copy)


# -- GGUF -----------------------------------------------------------------------------------

HEAD = b"GGUF" + struct.pack("<I", 3)
KEY = struct.pack("<Q", 1) + b"a"
GGUF = {
    "nothing": b"",
    "a word": b"GGUF nothing",
    "another version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(8),
    "tensors without end": HEAD + struct.pack("<QQ", 2**60, 0) + bytes(99),
    "entries without end": HEAD + struct.pack("<QQ", 0, 2**60) + bytes(99),
    "a key without end": HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(99),
    "a text without end": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IQ", 8, 2**62) + bytes(99),
    "a list without end": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 4, 2**61) + bytes(99),
    "lists in lists": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99,
    "an unknown type": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<I", 77) + bytes(99),
    "axes without end": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 2**31) + bytes(99),
    "a tensor of a petabyte": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQIQ", 1, 2**50, 0, 0) + bytes(99),
    "a tensor beyond the end": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQIQ", 1, 4, 0, 2**50) + bytes(99),
}


@pytest.mark.parametrize("what", GGUF)
def test_a_gguf_that_counts_more_than_it_holds_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(GGUF[what])
    with pytest.raises(CheckpointError, match="bad.gguf cannot be read as a Llama in GGUF form"):
        foreign.check_gguf(tmp_path / "bad.gguf")


def test_a_whole_gguf_passes(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "little.gguf")
    foreign.check_gguf(tmp_path / "little.gguf")
    raw = (tmp_path / "little.gguf").read_bytes()
    for stop in np.linspace(0, len(raw) - 1, 20).astype(int)[:10]:
        (tmp_path / "cut.gguf").write_bytes(raw[:stop])
        with pytest.raises(CheckpointError):
            foreign.check_gguf(tmp_path / "cut.gguf")
