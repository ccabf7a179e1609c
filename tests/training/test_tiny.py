"""The recipe of `tiny` on a handful of steps: each stage changes its own parts only, learns and repeats exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

import llava_lab as ll
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.results import only_writer
from llava_lab.training import Running, train
from llava_lab.training.smol.make import train_smol
from llava_lab.training.text import IGNORE, encode
from llava_lab.training.tiny.batches import apart, apart_loss, joined, joined_loss
from llava_lab.training.tiny.language import statements
from llava_lab.training.tiny.make import Work, tokenizer_of_run
from llava_lab.training.tiny.model import build_config, build_model, build_processor, build_tokenizer
from llava_lab.training.tiny.pictures import NOTHING, OTHER_COLORS, OTHER_KINDS, make_pool, retold, truth_of
from llava_lab.training.tiny.sight import FORMS, InstructData
from llava_lab.training.tiny.streams import shared_prefix
from llava_lab.training.tiny.tower import normalise, swapped
from llava_lab.worlds.picturebook import SHORT, scene, write_dataset
from llava_lab.worlds.questions import NUMBERS, place_of
from llava_lab.worlds.scenes import KIND_NAMES, Scene, Thing
from tests.support.closeness import TERMS, close
from tests.support.training_rows import QUICK, SMALL, write_rows

PARTS = {"tower": "vision_tower", "language": "language_model|lm_head", "align": "multi_modal_projector"}
PARTS["instruct"] = "multi_modal_projector|language_model|lm_head"


@pytest.fixture
def folder(quick_run: Path) -> Path:
    return quick_run


@pytest.fixture(scope="module")
def tokenizer(quick_run: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(quick_run / "tokenizer")


def losses(folder: Path, stage: str) -> list[float]:
    return torch.load(folder / f"{stage}.pt", weights_only=True)["losses"]


def test_every_stage_changes_its_own_parts_bitwise_and_nothing_else(folder: Path) -> None:
    work = Work(QUICK, folder, 1.0)
    after: dict[str, torch.Tensor] = {k: v.clone() for k, v in work.model.state_dict().items()}
    for stage in QUICK.stages:
        before = dict(after)
        work.load([stage.name])
        after = {k: v.clone() for k, v in work.model.state_dict().items()}
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        own = {name for name in after if any(part in name for part in PARTS[stage.name].split("|"))}
        assert changed <= own, f"{stage.name} changed {sorted(changed - own)[:3]}"
        missed = {n for n in own - changed if "position_ids" not in n and not _last_tower_layer(n)}
        assert not missed, f"{stage.name} left {sorted(missed)[:3]} untouched"


def _last_tower_layer(name: str) -> bool:
    """Key biases shift every score alike, so softmax gives them no gradient worth a bit."""
    return name.endswith("k_proj.bias")


def test_losses_fall(folder: Path) -> None:
    for stage in ("tower", "align"):
        found = losses(folder, stage)
        assert np.mean(found[-2:]) < np.mean(found[:2]), f"{stage}: {found}"
    text = losses(folder, "language")
    assert text[7] < text[0]  # steps 0 and 7 read descriptions


def prepared(folder: Path, out: Path) -> Path:
    """A new run's folder with what needs no second making: words and pictures."""
    for part in ("tokenizer", "pool"):
        shutil.copytree(folder / part, out / part)
    return out


@pytest.mark.long
def test_same_seed_same_losses_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        prepared(folder, tmp_path / name)
        train("quick", tmp_path / name, recipe=QUICK, stages=["tower"], seed=seed)
        assert (losses(tmp_path / name, "tower") == losses(folder, "tower")) == (name == "again")


def test_finished_stages_are_not_repeated(folder: Path) -> None:
    before = (folder / "tower.pt").stat().st_mtime_ns
    train("quick", folder, recipe=QUICK, resume=True)
    assert (folder / "tower.pt").stat().st_mtime_ns == before


def test_the_saved_model_loads_and_answers(folder: Path) -> None:
    from llava_lab.models import load

    lab = load(str(folder / "model"))
    run = lab.ask(scene("test", 0).picture(), "What color is the car?", max_new_tokens=5)
    assert len(run.image_positions) == 36
    assert lab.card.connector == "mlp2x_gelu"


def test_logs_carry_the_share_of_supervised_tokens(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "instruct.jsonl").read_text().splitlines()]
    assert all(0 < row["supervised"] < 1 for row in rows)
    assert "by_type" in rows[-1]


def test_questions_apart_equal_the_stock_forward_of_each_alone(tokenizer) -> None:
    config = build_config(SMALL, tokenizer)
    model = build_model(config, seed=3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    turns = [("What color is the car?", "The car is red."), (f"How big is it?\n{SHORT}", "small"), ("Where?", "On the left.")]
    batch = apart(tokenizer, [turns, turns[::-1]], system=True)
    embed = model.model.language_model.embed_tokens
    prefix = embed(batch.prefix)[None].repeat(2, 1, 1)
    with torch.no_grad():
        hidden = shared_prefix(model.model.language_model, prefix, embed(batch.ids))
        for b in range(2):
            for n in range(3):
                length = int((batch.ids[b, n] != tokenizer.pad_token_id).sum())
                whole = torch.cat([batch.prefix, batch.ids[b, n, :length]])[None]
                stock = model.model.language_model(input_ids=whole).last_hidden_state[0, len(batch.prefix) :]
                close(hidden[b, n, :length], stock, terms=TERMS)


def test_losses_apart_and_joined_agree_on_a_single_turn(tokenizer) -> None:
    config = build_config(SMALL, tokenizer)
    model = build_model(config, seed=3).eval()
    image_id = int(tokenizer.convert_tokens_to_ids("<image>"))
    turns = [("What color is the car?", "The car is red.")]
    tokens = torch.randn(1, 36, SMALL.hidden)
    with torch.no_grad():
        one, _ = apart_loss(model, apart(tokenizer, [turns], system=True), tokens, image_id)
        two = joined_loss(model, joined(tokenizer, [encode(tokenizer, turns, system=True)]), tokens, image_id)
    close(one, two, terms=TERMS)


def test_training_pictures_are_what_the_processor_shows_the_model(tokenizer) -> None:
    config = build_config(SMALL, tokenizer)
    processor = build_processor(config, tokenizer)
    drawn = scene("test", 4)
    small, owners, things = truth_of(drawn, SMALL.image, SMALL.grid)
    shown = processor.image_processor(images=drawn.picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalise(small[None]), shown.float(), atol=1e-5, rtol=1e-5)
    assert set(np.unique(owners)) <= {NOTHING, *range(len(drawn.things))}
    for i, thing in enumerate(drawn.things):
        assert owners[int(thing.y * SMALL.grid) * SMALL.grid + int(thing.x * SMALL.grid)] == i
        assert things[i][2] == (thing.size == "large")


def test_the_pool_is_the_same_however_it_is_drawn(tmp_path: Path) -> None:
    one = make_pool(tmp_path / "a", n=5, side=48, grid=6, workers=1)
    two = make_pool(tmp_path / "b", n=7, side=48, grid=6, workers=2)
    assert np.array_equal(one.pictures, two.pictures[:5])
    assert np.array_equal(one.owners, two.owners[:5])


def test_hard_negatives_differ_and_never_show_a_held_out_pair() -> None:
    for i in range(60):
        original = scene("train", i)
        other = swapped(original, np.random.default_rng(i))
        assert other.things != original.things
        assert not any(t.held_out for t in other.things)


def test_any_text_a_user_types_encodes_and_decodes(tokenizer) -> None:
    for text in ("What colour is the car?", "¿Dónde está el coche? 🚗", "日本語\ttabs\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_bad_requests_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="recipe must be one of tiny"):
        train("huge", tmp_path)
    with pytest.raises(OptionError, match="stages are tower, language, align, instruct"):
        train("tiny", tmp_path, stages=["pretrain"])
    with pytest.raises(OptionError, match="--resume"):
        train("quick", folder, recipe=QUICK)
    with pytest.raises(OptionError, match="train stage tower first"):
        train("quick", prepared(folder, tmp_path / "gap"), recipe=QUICK, stages=["language"])


def test_a_scene_without_a_question_is_described_instead(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path, n=24, side=32, grid=4)
    monkeypatch.setattr("llava_lab.training.tiny.sight.conversation", lambda *_: [])
    data = InstructData(pool, tokenizer, batch=4, turns=4, seed=0)
    form, batch, _ = data[FORMS.index("joined")]
    assert form == "joined"
    assert ((batch.ids == data.image_id).sum(1) == 1).all()
    assert ((batch.labels != IGNORE).sum(1) > 5).all()


# -- what the language stage reads


def things_named(drawn: Scene, words: list[str]) -> list[Thing]:
    return [t for t in drawn.things if all(w in (t.kind, t.color, t.size, "thing") for w in words)]


def one_named(drawn: Scene, words: list[str]) -> Thing:
    found = things_named(drawn, words)
    assert len(found) == 1, f"{words} fits {found}"
    return found[0]


def test_single_facts_are_true_and_pick_out_one_thing() -> None:
    forms = set()
    for i in range(80):
        drawn = scene("train", i)
        for given, known in statements(drawn, np.random.default_rng(i), 12):
            words, value = given.split(), known.strip(" .").removeprefix("an ").removeprefix("a ")
            forms.add(words[0] + words[1])
            if given.startswith(" The number of"):
                many = [w.removesuffix("s") if w.removesuffix("s") in (*KIND_NAMES, "thing") else w for w in words[3:-1]]
                assert NUMBERS.index(value) == len(things_named(drawn, many))
            elif words[0] in ("Across", "Up"):
                start, split = words.index("from") + 2, words.index("the", words.index("from") + 2)
                other, thing = one_named(drawn, words[start:split]), one_named(drawn, words[split + 1 : -1])
                gap = thing.x - other.x if words[0] == "Across" else thing.y - other.y
                assert value == {"Across": ("left", "right"), "Up": ("above", "below")}[words[0]][gap > 0]
            else:
                hidden = words[1] if words[2] == "of" else "kind"
                thing = one_named(drawn, words[4:-1] if words[2] == "of" else words[1:-1])
                assert value == (place_of(thing) if hidden == "place" else getattr(thing, hidden))
    assert {"Theplace", "Thecolor", "Thesize", "Thenumber", "Acrossfrom", "Upor"} <= forms


def test_a_scene_retold_keeps_what_is_alike_and_never_makes_a_held_out_pair() -> None:
    new = set()
    for i in range(200):
        drawn = scene("train", i)
        other = retold(drawn, np.random.default_rng(i))
        for key in ("kind", "color"):
            old, names = ([getattr(t, key) for t in s.things] for s in (drawn, other))
            assert [[a == b for b in old] for a in old] == [[a == b for b in names] for a in names]
            new |= set(names)
        assert not any(t.held_out for t in other.things)
        assert [(t.x, t.y, t.size) for t in other.things] == [(t.x, t.y, t.size) for t in drawn.things]
    assert set(OTHER_KINDS) | set(OTHER_COLORS) <= new


def test_a_damaged_pool_is_drawn_anew_and_an_older_one_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw = partial(make_pool, tmp_path, n=3, side=48, grid=6)
    first = np.array(draw().pictures)
    done = next(tmp_path.glob("*.done"))
    for path in sorted(tmp_path.glob("*")):
        path.write_bytes(path.read_bytes()[:-3])
        assert np.array_equal(draw().pictures, first)
        assert "they are made anew" in caplog.text
        caplog.clear()
    done.write_bytes(b"")
    next(tmp_path.glob("*.owners.npy")).touch()
    draw()
    assert "made anew" not in caplog.text
    assert done.read_bytes() == b""


def test_a_tokenizer_half_written_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: PreTrainedTokenizerFast, folder: Path) -> None:
        (Path(folder) / "tokenizer_config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_lab.training.tiny.make.build_tokenizer", partial(build_tokenizer, samples=100))
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenizer_of_run(tmp_path / "tokenizer", 300)
    assert list(tmp_path.iterdir()) == []
    assert len(tokenizer_of_run(tmp_path / "tokenizer", 300)) > 256


@pytest.mark.parametrize("entry", ["train", "train_smol", "train_stage", "compare_connectors", "leaderboard", "write_dataset"])
def test_every_entry_that_fills_a_folder_is_its_only_writer(tmp_path: Path, tiny_random: Lab, entry: str) -> None:
    rows, out = write_rows(tmp_path), tmp_path / "out"
    calls: dict[str, Callable[[], Any]] = {
        "train": lambda: train("quick", out, recipe=QUICK),
        "train_smol": lambda: train_smol(out),
        "train_stage": lambda: ll.train_stage(tiny_random, rows, "instruct", tmp_path, running=Running(progress=False)),
        "compare_connectors": lambda: ll.compare_connectors(start="tiny", out=out, progress=False),
        "leaderboard": lambda: ll.leaderboard(tiny_random, out=out / "lines.jsonl", n=1, progress=False),
        "write_dataset": lambda: write_dataset(out, n=2, progress=False),
    }
    place = {"train_stage": tmp_path / "instruct", "leaderboard": out / "lines.jsonl"}.get(entry, out)
    with only_writer(place, folder=entry != "leaderboard"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OptionError, match=rf"{place} is being written by process {os.getpid()} \("):
            calls[entry]()
        assert sorted(tmp_path.rglob("*")) == before
