"""LLaVA's data: rows found in the file, checked before the first step, mixed and grouped as LLaVA groups them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_lab.errors import DataError, OptionError
from llava_lab.models import Lab, layout
from llava_lab.training import rows as json_rows
from llava_lab.training.rows import (
    LlavaData,
    Order,
    Problems,
    Source,
    Text,
    as_sources,
    build_index,
    epoch_rows,
    group_by_modality,
)
from tests.support.training_rows import turn, write_json, write_rows

IGNORE = -100


def text_of(lab: Lab, stage: str = "instruct", **options: Any) -> Text:
    return Text(
        lab.tokenizer, lab.image_id, layout.image_token_count(lab.model), options.pop("context", lab.context), stage, **options
    )


def open_data(lab: Lab, source: Source, out: Path, *, stage: str = "instruct", skip: bool = False, **options: Any) -> LlavaData:
    problems = Problems(skip=skip)
    index = build_index(source, text_of(lab, stage, **options), out / "rows.index", problems=problems, progress=False)
    problems.refuse()
    return LlavaData([source], [index], text_of(lab, stage, **options))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_rows_of_a_list_are_found_as_json_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, style: dict[str, Any]
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    rows = [{"a": 'x"}{[', "b": [{"c": [1, 2]}, "]"]}, {"z": "\\"}, {}, "text", [1, {"a": []}], {"q": "ü\u2028"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, **style), encoding="utf-8")
    raw = path.read_bytes()
    assert [json.loads(raw[a:b]) for a, b in json_rows.row_spans(path)] == rows


def test_rows_of_a_file_that_ends_early_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"b": "x}]')
    with pytest.raises(DataError, match=r"rows.json ends inside row 1"):
        list(json_rows.row_spans(path))
    path.write_text('[{"a": 1}, null, {"b": 2}]')
    with pytest.raises(DataError, match="before row 1"):
        list(json_rows.row_spans(path))


BAD: list[tuple[Any, str | None]] = [  # None: it is fine
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "turn 1 is from 'human'.*must alternate",
    ),
    ({"conversations": turn("a", "b")[:1]}, "has 1 turns"),
    ({"image": "images/none.png", "conversations": turn("<image>\na", "b")}, "missing picture .*none.png"),
    ({"image": "images/0.png", "conversations": turn("a", "b")}, "has <image> in a question"),
    ({"conversations": turn("<image>\na", "b")}, "names no 'image'"),
    ({"conversations": turn("a", "b </s> c")}, "'</s>', which ends an answer"),
    ({"conversations": turn("a", " ")}, "an answer is empty"),
    ({"conversations": turn("a", "word " * 400)}, r"tokens with its picture, the model's context is 512; shorten its answer"),
    (["a"], "expected an object"),
    ({"conversations": turn("a", "b \ud83d c")}, r"turn 1 holds half a character \(U\+D83D\)"),
    ({"conversations": turn("a", "b" * (1 << 21))}, "its text has 2,097,153 characters, at most 1,048,576 are read"),
    ({"image": "a" * 5000, "conversations": turn("<image>\na", "b")}, r"missing picture .{80,120} \.\.\. a{20}"),
    ({"image": "nu\0l", "conversations": turn("<image>\na", "b")}, "missing picture"),
    ({"image": ["x" * 5000], "conversations": turn("<image>\na", "b")}, r"missing picture .{80,120} \.\.\. x{20}"),
    ({"conversations": [{"from": "z" * 5000, "value": "a"}, *turn("a", "b")[::-1]]}, "turn 0 is from 'gpt', expected 'human'"),
    ({"conversations": turn("a", "b"), "z": int("9" * 4300)}, None),
    ({"image": ["images/0.png", "images/1.png"], "conversations": turn("<image>\na", "b")}, "names 2 pictures"),
    ({"image": {"bytes": None}, "conversations": turn("<image>\na", "b")}, "'image' must be the path of one picture"),
    ({"image": "", "conversations": turn("<image>\na", "b")}, "names no 'image'"),
    (
        {"image": "images/0.png", "conversations": turn("<image>\na", "b") + turn("<image>\nc", "d")},
        "2 questions hold <image> and the row names one picture",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type 'audio'"),
    ({"messages": "a"}, "a conversation must be a list"),
    ({"conversations": turn("a", "\ud800")}, "half a character"),
]
RAW: list[tuple[bytes, str]] = [  # what no writer of JSON gives
    (b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "broken JSON .brackets within brackets"),
    (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON"),
    (b'{"a": "\xff\xfe"}', "broken JSON .*utf-8"),
    (b'{"a": "' + b"\\n" * 1_500_000 + b'"}', "row 1.* (a string of more than|has 3,000,0.. bytes, at most)"),
    (b"{'a': 1}", "broken JSON"),
]
PARTS = [{"type": "image"}, {"type": "text", "text": "a"}]
SHOWN: dict[str, dict[str, Any]] = {
    "LLaVA's": {"image": "images/0.png", "conversations": turn("<image>\na", "b")},
    "a list of one": {"image": ["images/0.png"], "conversations": turn("<image>\na", "b")},
    "images": {"images": ["images/0.png"], "conversations": turn("<image>\na", "b")},
    "the mark behind": {"image": "images/0.png", "conversations": turn("a\n<image>", "b")},
    "the mark twice in one question": {"image": "images/0.png", "conversations": turn("<image>\n<image>\na", "b")},
    "a system before": {
        "image": "images/0.png",
        "conversations": [{"from": "system", "value": "x"}, *turn("<image>\na", "b")],
    },
    "role and content": {
        "image": "images/0.png",
        "messages": [{"role": "user", "content": "<image>\na"}, {"role": "assistant", "content": "b"}],
    },
    "parts": {"images": "images/0.png", "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "b"}]},
}
UNSHOWN: dict[str, dict[str, Any]] = {
    "no image": {"conversations": turn("a", "b")},
    "null": {"image": None, "conversations": turn("a", "b")},
    "empty": {"image": "", "conversations": turn("a", "b")},
    "an empty list": {"image": [], "conversations": turn("a", "b")},
    "a list of nothing": {"image": [""], "images": None, "conversations": turn("a", "b")},
}


@pytest.mark.parametrize("form", [*SHOWN, *UNSHOWN])
def test_rows_as_people_hold_them_are_one_row(tmp_path: Path, tiny_random: Lab, form: str) -> None:
    write_rows(tmp_path, count=1)
    rows = [(SHOWN | UNSHOWN)[form], SHOWN["LLaVA's"] if form in SHOWN else UNSHOWN["no image"]]
    data = open_data(tiny_random, Source(write_json(tmp_path / "held.json", rows)), tmp_path)
    assert data[0]["ids"].tolist() == data[1]["ids"].tolist()
    assert data[0]["labels"].tolist() == data[1]["labels"].tolist()
    assert len(list(data.pictures())) == (form in SHOWN)


@pytest.mark.parametrize(("row", "why"), BAD)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_bad_row_is_named_and_refused_or_skipped(
    tmp_path: Path, tiny_random: Lab, row: Any, why: str | None, suffix: str
) -> None:
    write_rows(tmp_path, count=2, text_every=0)
    good = {"image": "images/0.png", "conversations": turn("<image>\na", "b")}
    source = Source(write_json(tmp_path / f"bad{suffix}", [good, row, good]))
    if why is None:
        assert len(open_data(tiny_random, source, tmp_path)) == 3
        return
    with pytest.raises(DataError, match=rf"bad{suffix} row 1: .*{why}.*--skip-bad"):
        open_data(tiny_random, source, tmp_path)
    assert len(open_data(tiny_random, source, tmp_path, skip=True)) == 2


@pytest.mark.parametrize(("raw", "why"), RAW)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_bytes_that_are_no_row_are_one_line(
    tmp_path: Path, tiny_random: Lab, monkeypatch: pytest.MonkeyPatch, raw: bytes, why: str, suffix: str
) -> None:
    monkeypatch.setattr(json_rows, "MOST_BYTES", 1 << 20)
    good = json.dumps({"conversations": turn("a", "b")}).encode()
    joined = b"[" + b",".join([good, raw, good]) + b"]" if suffix == ".json" else b"\n".join([good, raw, good])
    (tmp_path / f"bad{suffix}").write_bytes(joined)
    with pytest.raises(DataError, match=why) as caught:
        open_data(tiny_random, Source(tmp_path / f"bad{suffix}"), tmp_path)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_another_coding_than_utf_8_is_named(tmp_path: Path, tiny_random: Lab, coding: str, suffix: str) -> None:
    text = json.dumps({"conversations": turn("a", "b")})
    (tmp_path / f"a{suffix}").write_text(f"[{text}]" if suffix == ".json" else text, encoding=coding)
    with pytest.raises(DataError, match=r"is UTF-16 or UTF-32 text; expected UTF-8"):
        open_data(tiny_random, Source(tmp_path / f"a{suffix}"), tmp_path)
    with pytest.raises(DataError, match="no such data file: .{80,120} ... "):
        open_data(tiny_random, Source(tmp_path / ("a" * 5000)), tmp_path)


def test_a_damaged_index_and_another_text_of_the_same_size_are_read_anew(tmp_path: Path, tiny_random: Lab) -> None:
    path = write_json(tmp_path / "a.json", [{"conversations": turn("a", word)} for word in ("one", "two")])
    stat, whole = path.stat(), open_data(tiny_random, Source(path), tmp_path)[1]["ids"]
    for name in ("rows.index", "rows.json"):
        for raw in (b"", b"[1", (tmp_path / name).read_bytes()[:-3], bytes(len((tmp_path / name).read_bytes()))):
            (tmp_path / name).write_bytes(raw)
            assert np.array_equal(open_data(tiny_random, Source(path), tmp_path)[1]["ids"], whole)
    path.write_text(path.read_text().replace('"one"', '"1" ').replace('"two"', '"six"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not np.array_equal(open_data(tiny_random, Source(path), tmp_path)[1]["ids"], whole)


def test_broken_json_in_one_row_leaves_its_neighbours(tmp_path: Path, tiny_random: Lab, caplog: pytest.LogCaptureFixture) -> None:
    row = json.dumps({"conversations": turn("a", "b")})
    for name, content in (("l.jsonl", f"{row}\n{row[:-2]}\n{row}\n"), ("l.json", f"[{row}, {{'a': 1}}, {row}]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name} row 1: broken JSON"):
            open_data(tiny_random, Source(tmp_path / name), tmp_path)
        assert len(open_data(tiny_random, Source(tmp_path / name), tmp_path, skip=True)) == 2
        assert f"skipped {tmp_path / name} row 1" in caplog.text


def test_instruct_learns_answers_and_their_ends_only(tmp_path: Path, tiny_random: Lab) -> None:
    data = open_data(tiny_random, Source(write_rows(tmp_path, count=4)), tmp_path)
    row = data[0]
    assert (row["ids"] == tiny_random.image_id).sum() == 16
    learnt = tiny_random.tokenizer.decode(row["labels"][row["labels"] != IGNORE])
    assert learnt.replace(" ", "") == "red</s>three</s>"
    text = tiny_random.tokenizer.decode(data[3]["ids"])  # text alone
    assert "<image>" not in text
    assert "USER: What color is the car? ASSISTANT: The car is white.</s>" in text


def test_align_learns_the_caption_and_its_newline_and_drops_the_request(tmp_path: Path, tiny_random: Lab) -> None:
    data = open_data(tiny_random, Source(write_rows(tmp_path, count=3, text_every=0)), tmp_path, stage="align")
    row = data[1]
    assert tiny_random.tokenizer.decode(row["labels"][row["labels"] != IGNORE]) == "blue\n"
    assert tiny_random.tokenizer.decode(row["ids"]).replace("<image>", "") == "<s>blue\n"
    with pytest.raises(DataError, match=r"row 3: stage align trains on pictures"):
        open_data(tiny_random, Source(write_rows(tmp_path, count=4)), tmp_path, stage="align")


def test_long_rows_are_cut_where_asked(tmp_path: Path, tiny_random: Lab) -> None:
    path = write_json(tmp_path / "long.json", [{"conversations": turn("a", "word " * 400)}])
    row = open_data(tiny_random, Source(path), tmp_path, cut_long=True)[0]
    assert len(row["ids"]) == len(row["labels"]) == tiny_random.context


def test_weights_are_times_per_epoch_and_epochs_share_out_the_rest() -> None:
    rows = [epoch_rows([10, 4], [0.5, 2.0], seed=3, epoch=epoch) for epoch in range(2)]
    assert [np.bincount(r, minlength=14)[10:].tolist() for r in rows] == [[2] * 4] * 2
    assert sorted(np.concatenate([r[r < 10] for r in rows])) == list(range(10))
    assert np.array_equal(rows[0], epoch_rows([10, 4], [0.5, 2.0], seed=3, epoch=0))
    assert not np.array_equal(rows[0], epoch_rows([10, 4], [0.5, 2.0], seed=4, epoch=0))


def test_grouped_batches_have_one_modality_and_even_chunks() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(1, 200, 100) * np.where(rng.random(100) < 0.3, -1, 1)
    order = group_by_modality(words, batch=4, chunks=2, rng=np.random.default_rng(1))
    assert sorted(order) == list(range(100))
    batches = [words[order[i : i + 8]] for i in range(0, 100, 8)]
    mixed = [i for i, batch in enumerate(batches) if len(set(np.sign(batch))) > 1]
    assert all(i >= len(batches) - 2 for i in mixed)  # only what was left of each modality, at the end
    spread = [abs(batch[:4].sum() - batch[4:].sum()) for batch in batches if len(batch) == 8]
    assert np.mean(spread) < np.abs(words).mean()
    single = group_by_modality(np.abs(words), batch=4, chunks=2, rng=np.random.default_rng(1))
    assert sorted(single) == list(range(100))


def test_order_is_the_same_for_equal_global_batches() -> None:
    words = np.arange(1, 41)
    options: dict[str, Any] = {"total": 80, "group": "modality", "seed": 5}
    one = list(Order(words, [40], [1.0], batch=4, chunks=2, **options))  # one process, two accumulated batches
    assert len(one) == 80
    assert sorted(one[:40]) == sorted(one[40:]) == list(range(40))
    assert one[:40] != one[40:]
    with pytest.raises(OptionError, match="group must be one of none, modality"):
        Order(words, [40], [1.0], batch=4, chunks=2, total=8, group="length", seed=0)


MEMORY = """
import json, resource, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from llava_lab.training.rows import *
from llava_lab.training.rows import Order
folder, text = Path(sys.argv[1]), Text(PreTrainedTokenizerFast.from_pretrained(sys.argv[2]), 3, 16, 512, "instruct")
row = json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a" * 60}]}) + "\\n"

def use(count):
    source = Source(folder / f"{count}.jsonl")
    with source.path.open("w") as out:
        for _ in range(count):
            out.write(row)
    index = build_index(source, text, folder / f"{count}.index", problems=Problems(), progress=False)
    data = LlavaData([source], [index], text)
    order = iter(Order(data.words, data.sizes, [1.0], total=count, batch=8, chunks=1, group="none", seed=0))
    assert len(data) == count and all(len(data[next(order)]["ids"]) for _ in range(50))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small = use(2_000)
print(use(120_000) - small)
"""


@pytest.mark.long
def test_memory_stays_flat_with_the_number_of_rows(tmp_path: Path, tiny_folder: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout) * 1024 / 118_000
    print(f"grown by {grown:.0f} bytes a row")
    # an order is 8 bytes a row, computed with a few copies; parsed rows would be over 500 bytes each
    assert grown < 120


@pytest.mark.parametrize(
    "data", [5, None, {}, {"file": "a.json"}, [], [5], [None], [["a.json"]], b"a.json", True, 1.5, object(), np.zeros(3)]
)
def test_data_that_is_no_file_is_refused_in_one_line(data: Any) -> None:
    with pytest.raises(OptionError, match="no data|data must be a file in LLaVA's format"):
        as_sources(data)


@pytest.mark.parametrize("data", ["a.json", Path("a.json"), Source("a.json"), ["a.json"], [Source("a.json")], (Path("a.json"),)])
def test_a_file_a_source_and_lists_of_them_are_data(data: Any) -> None:
    assert [str(source.path) for source in as_sources(data)] == ["a.json"]


@pytest.mark.parametrize("options", [
    {"file": 5}, {"file": None}, {"file": b"a"}, {"images": 5}, {"images": ["a"]}, {"weight": "x"}, {"weight": None},
    {"weight": 0}, {"weight": -1}, {"weight": float("nan")}, {"weight": float("inf")},
    {"suffix": []}, {"suffix": None}, {"suffix": "x"},
])  # fmt: skip
def test_a_source_of_odd_parts_is_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}.* must be"):
        Source(**{"file": "a.json", **options})
