"""`train_smol` on a little language model: what is written is what was trained, what is frozen stays, a stopped run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_lab.cli import main as cli
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import layout
from llava_lab.models.formats import smol
from llava_lab.models.formats import smol as gguf_cache
from llava_lab.training import loop
from llava_lab.training.smol import make as training
from llava_lab.training.smol.batches import IGNORE, SmolData
from llava_lab.training.smol.make import SMOL, train_smol
from llava_lab.worlds.picturebook import scene
from tests.support.little_language import llama, write_gguf

RECIPE = replace(
    SMOL,
    rank=2,
    align=replace(SMOL.align, steps=3, batch=2, rate=1e-2),
    instruct=replace(SMOL.instruct, steps=3, batch=2),
    practice=replace(SMOL.practice, steps=2, batch=2),
    recall=replace(SMOL.recall, steps=2, batch=2),
)
TEXTS = [[9, 30, 12, 55, 7, 2]] * 3


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(llama(), folder / "little.gguf")
    return gguf_cache.language_folder(folder / "little.gguf", cache=folder / "cache")


@pytest.fixture(scope="module", autouse=True)
def _short_checks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CHECK_PICTURES", 2)
        patch.setattr(training.Check.__init__, "__kwdefaults__", {"pictures": 2, "batch": 2})
        yield


@pytest.fixture(scope="module")
def run(language: Path) -> Iterator[Callable[..., Path]]:
    """In this process, where a planted interrupt is heard and nothing has to start."""

    def go(out: Path, **options: Any) -> Path:
        return train_smol(out, **{"recipe": RECIPE, "parts": {"language": language}, "texts": TEXTS, **options})

    train = loop.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", lambda *args, **options: train(*args, **{**options, "workers": 0}))
        yield go


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "smol")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / smol.WEIGHTS)


def test_what_is_written_is_the_connector_and_two_matrices_for_every_linear_layer(whole: Path, language: Path) -> None:
    names = set(weights(whole))
    model, _ = smol.assemble(language=language)
    linear = [n for n, m in layout.language_model(model).named_modules() if isinstance(m, torch.nn.Linear)]
    connector = {f"connector.{name}" for name in layout.connector_of(model).state_dict()}
    assert names == connector | {f"lora.{name}.{part}" for name in linear for part in ("down", "up")}
    assert all(weights(whole)[f"lora.{name}.up"].abs().sum() > 0 for name in linear)


def test_the_loaded_model_says_what_the_adapted_one_said(whole: Path, language: Path) -> None:
    state = torch.load(whole.parent / "recall.pt", weights_only=True)["modules"]
    adapted, _ = smol.assemble(language=language)
    training.adapt(layout.language_model(adapted), RECIPE.rank, RECIPE.scale, 0).load_state_dict(state["lora"])
    layout.connector_of(adapted).load_state_dict(state["connector"])
    merged, processor = smol.load_smol(torch.float32, whole, language=language)
    asked = processor(images=scene().picture(), text="<|im_start|>user\n<image>\nx<|im_end|>\n", return_tensors="pt")
    with torch.no_grad():
        one, two = adapted(**asked).logits, merged(**asked).logits
    assert torch.allclose(one, two, atol=2e-2)  # the written weights are bfloat16
    plain, _ = smol.assemble(language=language)
    assert not torch.allclose(plain(**asked).logits, two, atol=5e-2)


@pytest.mark.long
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_bits(
    run: Callable[..., Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = SmolData.__getitem__, []
    monkeypatch.setattr("llava_lab.training.loop.SAVE_EVERY", 0.0)

    def stops(self: SmolData, step: int) -> Any:
        now = self.stage, step
        if now in (("align", 1), ("instruct", 2), ("practice", 1), ("recall", 1)) and now not in taken:
            taken.append(now)
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(SmolData, "__getitem__", stops)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "smol", resume=True)
    found = weights(run(tmp_path / "smol", resume=True))
    assert len(taken) == 4
    assert all(torch.equal(value, found[name]) for name, value in weights(whole).items())


def test_grey_pictures_carry_nothing(language: Path) -> None:
    model, processor = smol.assemble(language=language)
    form = training.Chat(processor.tokenizer, layout.image_token_count(model))
    seen, blind = (SmolData(form, stage="align", batch=2, side=96, seed=0, blind=grey)[0] for grey in (False, True))
    assert torch.equal(seen.ids, blind.ids)
    assert seen.pictures is not None
    assert blind.pictures is not None
    assert torch.equal(blind.pictures[0], blind.pictures[1])
    assert not torch.equal(seen.pictures[0], seen.pictures[1])


def test_only_answers_are_learned_and_each_by_the_token_before_it(language: Path) -> None:
    model, processor = smol.assemble(language=language)
    form = training.Chat(processor.tokenizer, layout.image_token_count(model))
    batch = form.batch([[[("who", "me")]]], np.zeros((1, 96, 96, 3), np.uint8))
    where = batch.labels[0] != IGNORE
    assert processor.tokenizer.decode(batch.labels[0][where]) == "me<|im_end|>"
    following = torch.cat([batch.ids[0, 1:], batch.ids[0, :1]])
    assert torch.equal(following[where], batch.labels[0][where])


def test_the_last_stage_reads_texts_half_of_the_time_and_stays_near_the_untouched_model(language: Path) -> None:
    model, processor = smol.assemble(language=language)
    teacher, _ = smol.assemble(language=language)
    teacher.requires_grad_(False)
    model.requires_grad_(False)
    form = training.Chat(processor.tokenizer, layout.image_token_count(model))
    data = SmolData(form, stage="recall", batch=2, side=96, seed=0, texts=TEXTS)
    assert [data[step].pictures is None for step in range(4)] == [False, True, False, True]
    alike, facts = training.distance(model, teacher, data[1], image_id=form.image_id)
    assert abs(float(alike)) < 1e-6
    assert facts["text"] == 1.0
    with torch.no_grad():
        layout.language_model(model).layers[0].mlp.down_proj.weight.mul_(3)
    apart, _ = training.distance(model, teacher, data[1], image_id=form.image_id)
    hidden, _ = training.states(model, data[1], image_id=form.image_id)
    expected, _ = training.states(teacher, data[1], image_id=form.image_id)
    p = teacher.get_output_embeddings()(expected).double().softmax(-1)
    q = model.get_output_embeddings()(hidden).double().softmax(-1)
    assert float(apart) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert float(apart) > 1e-4


def test_bad_calls_are_one_line(run: Callable[..., Path], whole: Path, tmp_path: Path, language: Path) -> None:
    with pytest.raises(OptionError, match="holds a run already; add --resume"):
        run(whole.parent)
    with pytest.raises(OptionError, match="stages are align, instruct, practice, recall; got moon"):
        run(tmp_path / "a", stages=["moon"])
    with pytest.raises(OptionError, match="train stage align first"):
        run(tmp_path / "b", stages=["instruct"])
    (tmp_path / "c").mkdir()
    for name in ("smol.json", smol.WEIGHTS):
        (tmp_path / "c" / name).write_bytes((whole / name).read_bytes()[:100])
    with pytest.raises(CheckpointError) as caught:
        smol.load_smol(torch.float32, tmp_path / "c", language=language)
    assert "\n" not in str(caught.value)
    assert "cannot be read (SafetensorError" in str(caught.value)
    tensors = weights(whole)
    first = next(name for name in tensors if name.endswith(".up"))
    for changed in ({first: tensors[first][:-1].contiguous()}, {first.replace("layers.0", "layers.7"): tensors[first].clone()}):
        save_file({**tensors, **changed}, tmp_path / "c" / smol.WEIGHTS)
        (tmp_path / "c" / "smol.json").write_bytes((whole / "smol.json").read_bytes())
        with pytest.raises(CheckpointError, match="do not fit the language model's layer|which the language model does not have"):
            smol.load_smol(torch.float32, tmp_path / "c", language=language)


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(training, "train_smol", lambda out, **options: given.update(options) or Path(out) / "weights")
    assert cli.main(["train", "smol", "--out", "x", "--seed", "3", "--compile", "--steps-scale", "0.5", "--stage", "align"]) == 0
    assert "connector and LoRA are in x/weights" in capsys.readouterr().out
    recipe = given.pop("recipe")
    assert recipe == replace(SMOL, seed=3)
    assert given == {"stages": ["align"], "resume": False, "steps_scale": 0.5, "fused": True}
