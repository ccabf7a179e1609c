"""From a name to a folder (shipped, local, or the hub's cache without a network), and the families that load: BakLLaVA by
LLaVA-1.5's path, a SigLIP tower with a Qwen2, others not at all and with what they would need."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import LlavaConfig, LlavaProcessor, MistralConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import llava_lab as ll
from llava_lab.errors import CheckpointError, LabError, OptionError, WriteError
from llava_lab.models import Lab, folders, layout, load
from llava_lab.models.folders import FAMILIES
from tests.support.answers import probabilities_check_out
from tests.support.checkpoints import V1_TEMPLATE, build_llama_model, build_processor, byte_tokenizer, llava_config
from tests.support.closeness import TERMS, close
from tests.support.refusals import refused

QUESTION = "What color is the car?"
METHODS = ("rollout", "relevancy", "occlusion", "gradient_input", "value_attention", "tam", "direct_logit")


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    assert "'tiny'" in refused("nonesuch")
    assert "hub id" in refused(str(tmp_path / "none"))
    assert "is a file" in refused(tmp_path / "file.txt")
    assert "config.json" in refused(tmp_path)


def test_a_missing_shipped_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "NAMES", {"tiny": tmp_path})
    assert "shipped model 'tiny' is missing" in refused("tiny")


def test_missing_shards_are_named(llava15_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava15_folder, tmp_path / "shards"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 1 of 3 weight files: model-00002-of-00003.safetensors" in refused(folder)


def hub_cache(root: Path, repo: str, source: Path) -> Path:
    """A hub cache as a download leaves it: blobs, one snapshot, refs/main."""
    base, commit = root / f"models--{repo.replace('/', '--')}", "c" * 40
    snapshot = base / "snapshots" / commit
    for place in (base / "blobs", base / "refs", snapshot):
        place.mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = base / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert constants.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_loads_from_the_cache_without_a_network(hub_home: Path, tiny_folder: Path, tiny_random: Lab) -> None:
    hub_cache(hub_home, "someone/llava-small", tiny_folder)
    lab = load("someone/llava-small")
    assert lab.fingerprint == tiny_random.fingerprint
    assert (lab.name, lab.card.source) == ("someone/llava-small", "hub someone/llava-small at cccccccccccc")


@pytest.mark.parametrize("name", ["someone/llava-small@v1", "someone/llava-small"])
def test_a_hub_id_can_be_pinned(hub_home: Path, tiny_folder: Path, tiny_random: Lab, name: str) -> None:
    """The tag's weights, not those of main: there they have moved on."""
    snapshot = hub_cache(hub_home, "someone/llava-small", tiny_folder)
    tagged = Path(shutil.copytree(snapshot, snapshot.with_name("a" * 40)))
    (snapshot / "config.json").unlink()
    (snapshot.parents[1] / "refs" / "v1").write_text(tagged.name)
    lab = load(name) if "@" in name else load(name, revision="v1")
    assert lab.fingerprint == tiny_random.fingerprint
    assert lab.card.source == "hub someone/llava-small at aaaaaaaaaaaa"
    assert "someone/llava-small@v2 is not in the hub cache" in refused("someone/llava-small", revision="v2")


@pytest.mark.parametrize("name", ["tiny", "smol", "tiny-mlp", "", ".", "someone/llava-small@v1"])
def test_what_is_not_at_the_hub_has_no_revision(hub_home: Path, name: str) -> None:
    assert "has no revision" in refused(name, OptionError, revision="main")


def test_a_hub_id_that_is_not_cached_is_one_line_offline(hub_home: Path) -> None:
    text = refused("llava-hf/llava-1.5-7b-hf")
    assert "not in the hub cache" in text
    assert "connect once" in text


def test_a_cached_hub_id_without_weights_is_refused(hub_home: Path, tiny_folder: Path) -> None:
    snapshot = hub_cache(hub_home, "someone/llava-half", tiny_folder)
    (snapshot / "model.safetensors").unlink()
    assert "no weights" in refused("someone/llava-half")


def test_a_folder_of_a_hub_id_s_name_comes_first(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_folder, tmp_path / "someone" / "here")
    monkeypatch.chdir(tmp_path)
    assert load("someone/here").card.source.startswith("folder")


def bakllava(folder: Path, window: int | None = None) -> Path:
    """BakLLaVA's form: `llava` with a Mistral whose heads share keys, and perhaps a sliding window."""
    tokenizer = byte_tokenizer()
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = llava_config(tokenizer, vision_layers=3, text=text)
    build_llama_model(config).save_pretrained(folder)
    build_processor(config, tokenizer, do_pad=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[None, 24], ids=["whole", "window"])
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return ll.load(bakllava(tmp_path_factory.mktemp("bakllava"), request.param))


def test_a_mistral_answers_and_its_log_probabilities_check_out(mistral: Lab, picture: np.ndarray) -> None:
    assert mistral.card.language.startswith("mistral")
    run = mistral.ask(picture, QUESTION, max_new_tokens=6)
    probabilities_check_out(mistral, run)


def test_watched_attention_is_eager_attention(mistral: Lab, picture: np.ndarray) -> None:
    run = mistral.ask(picture, QUESTION, max_new_tokens=4)
    rel = ll.attribute(mistral, run, method="attention")
    mistral.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = mistral.model(**mistral.inputs(run), output_attentions=True).attentions
    finally:
        mistral.model.set_attn_implementation("sdpa")
    rows = torch.stack(seen)[:, 0, :, list(run.target().positions)].mean((0, 1, 2)).numpy()
    close(rel.values[0].ravel(), rows[slice(*run.segments["image"])], terms=64 * 3)


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_on_shared_keys(mistral: Lab, picture: np.ndarray, method: str) -> None:
    run = mistral.ask(picture, QUESTION, max_new_tokens=3)
    rel = ll.attribute(mistral, run, method=method, target=0)
    assert np.isfinite(rel.values).all()
    assert rel.values.std() > 0


def test_occlusion_behind_the_connector_uses_kept_keys_only_where_they_are_kept(mistral: Lab, picture: np.ndarray) -> None:
    """A cache that slides forgets the beginning; its shortcut is found out and refused."""
    run = mistral.ask(picture, QUESTION, max_new_tokens=3)
    if mistral.model.config.text_config.sliding_window:
        with pytest.raises(LabError, match="does not keep a plain causal cache: use at='pixels'"):
            ll.attribute(mistral, run, method="occlusion", at="projector", fill="mean")
        return
    one = ll.attribute(mistral, run, method="occlusion", at="projector", fill="mean", batch=1).values
    many = ll.attribute(mistral, run, method="occlusion", at="projector", fill="mean", batch=16).values
    close(one, many, terms=64 * 3 * len(run.answer_positions))


def test_a_cut_edge_carries_nothing(mistral: Lab, picture: np.ndarray) -> None:
    run = mistral.ask(picture, QUESTION, max_new_tokens=3)
    effect = ll.knockout(mistral, run, source="image", target="question", layers=(0, 3), score="logprob")
    assert effect.proof["largest"] == 0
    assert effect.proof["edges"] > 0
    assert effect.proof["decode_error"] < 1e-3
    close(effect.before[0], float(run.logprobs.sum()), terms=TERMS)


@pytest.mark.parametrize("family", ["qwen2_vl", "video_llava", "idefics3", None])
def test_another_family_is_told_what_an_adapter_needs(tmp_path: Path, family: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} if family else {}))
    with pytest.raises(CheckpointError) as error:
        ll.load(tmp_path)
    said = str(error.value)
    assert "\n" not in said
    assert repr(family) in said
    assert "An adapter for it" in said
    assert all(repr(known) in said for known in FAMILIES)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """No class token, every feature kept, 30 px in patches of 8: a 3x3 grid with an unseen rim."""
    folder: Path = tmp_path_factory.mktemp("relative")
    tokenizer = byte_tokenizer()
    vision = SiglipVisionConfig(
        image_size=30, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    vision.vision_use_head = False
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    build_llama_model(config).save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": 30, "width": 30})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=V1_TEMPLATE
    ).save_pretrained(folder)
    return load(folder)


def test_its_grid_has_no_class_token_and_every_layer_counts(siglip: Lab) -> None:
    assert siglip.grid == (3, 3)
    assert not layout.has_class_token(siglip.model)
    assert len(layout.used_vision_layers(siglip.model)) == 3
    assert siglip.card.vision.startswith("siglip_vision_model")
    assert siglip.card.language.startswith("qwen2")


def test_its_pictures_are_padded_and_its_answers_check_out(siglip: Lab, picture: np.ndarray) -> None:
    run = siglip.ask(picture, "What color is the car?", prompt="chat", max_new_tokens=6)
    assert (run.map.mode, len(run.image_positions)) == ("pad", 9)
    probabilities_check_out(siglip, run)


@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "link to a file", "link to a pipe"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_folder_does_not_take_the_place_of_what_is_none(tmp_path: Path, kind: str, keep: bool) -> None:
    """A model saved to /dev/null by root once put a folder there."""
    place, real = tmp_path / "out", tmp_path / "real"
    at = real if kind.startswith("link") else place
    if kind.endswith("file"):
        at.write_text("mine", "utf-8")
    else:
        os.mkfifo(at) if kind.endswith("pipe") else os.mknod(at, stat.S_IFSOCK | 0o600)
    if at is real:
        place.symlink_to(real)
    before = place.lstat()
    with pytest.raises(WriteError, match="is no folder"), folders.whole_folder(place, keep=keep) as part:
        (part / "config.json").write_text("{}", "utf-8")
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "real"] if at is real else ["out"])
