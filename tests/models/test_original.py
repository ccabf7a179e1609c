"""Original LLaVA folders: every layout gives the logits of the same weights in transformers' classes; what cannot be read exactly
is refused in one line that names it; words that stand in tokenizer.model only are read as sentencepiece itself reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import LlavaForConditionalGeneration

from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, connectors, load
from llava_lab.models.formats import original
from llava_lab.models.formats.original import read_tokenizer
from llava_lab.models.formats.original_weights import new_rows
from tests.support import original_folders as made
from tests.support.closeness import close
from tests.support.original_folders import IMAGE_ID, PAD_ID, ROWS, WORDS, Parts
from tests.support.refusals import refused

QUESTION = "What color is the car?"
TEXTS = (
    "What color is the car?",
    "USER: hello\nASSISTANT:",
    "Zürich 42 é",
    "two  spaces ",
)  # spaces in front are transformers' own affair: its LlamaTokenizer drops one
SPECIAL = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return made.make_parts()


def agrees(lab: Lab, parts: Parts) -> None:
    """The lab's logits are the reference's, and its words are where they should be."""
    ids, pixels = made.probe()
    close(made.logits(lab.model, ids, pixels), made.logits(parts.model, ids, pixels), terms=64 * 2)
    assert lab.image_id == IMAGE_ID == lab.tokenizer.convert_tokens_to_ids("<image>")
    assert lab.tokenizer.pad_token_id == PAD_ID == lab.model.config.pad_token_id
    assert lab.model.config.text_config.vocab_size == ROWS == lab.model.lm_head.weight.shape[0]


@pytest.mark.parametrize(("shards", "safetensors"), [(1, False), (3, False), (3, True)])
def test_a_consolidated_checkpoint_gets_its_tower_from_a_folder(
    tmp_path: Path, parts: Parts, shards: int, safetensors: bool
) -> None:
    folder = made.write_whole(tmp_path / "llava", parts, shards=shards, safetensors=safetensors)
    lab = load(folder, vision=made.write_tower(tmp_path / "clip", parts))
    agrees(lab, parts)
    assert (lab.card.connector, lab.card.fit, lab.grid) == ("mlp2x_gelu", "pad", (4, 4))
    assert "original LLaVA format" in lab.card.source
    assert str(tmp_path / "clip") in lab.card.source


def test_a_tower_that_the_config_names_as_a_folder_is_found(tmp_path: Path, parts: Parts) -> None:
    tower = made.write_tower(tmp_path / "clip", parts)
    agrees(load(made.write_whole(tmp_path / "llava", parts, mm_vision_tower=str(tower))), parts)


def test_a_checkpoint_with_the_tower_inside_uses_that_one(tmp_path: Path, parts: Parts) -> None:
    folder = made.write_whole(tmp_path / "llava", parts, inside=True)
    other = made.make_parts(seed=8)
    lab = load(folder, vision=made.write_tower(tmp_path / "clip", other))  # its sizes only
    agrees(lab, parts)
    assert "inside" in lab.card.source


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_other_projectors_are_read_by_their_own_names(tmp_path: Path, kind: str) -> None:
    parts = made.make_parts(kind)
    folder = made.write_whole(tmp_path / "llava", parts, shards=1, mm_projector_type=None if kind == "linear" else kind)
    lab = load(folder, vision=made.write_tower(tmp_path / "clip", parts))
    agrees(lab, parts)
    assert lab.card.connector == kind


def test_v1_s_family_name_and_last_layer_are_read(tmp_path: Path) -> None:
    parts = made.make_parts("linear", layer=-1)
    changes: dict[str, Any] = {"model_type": "llava", "mm_vision_select_layer": -1, "image_aspect_ratio": "square"}
    folder = made.write_whole(tmp_path / "llava", parts, shards=1, **changes)
    lab = load(folder, vision=made.write_tower(tmp_path / "clip", parts))
    agrees(lab, parts)
    assert lab.card.fit == "crop"


def test_pictures_between_marks_as_v1_had_them(tmp_path: Path, parts: Parts, picture: np.ndarray) -> None:
    folder = made.write_whole(tmp_path / "llava", parts, mm_use_im_start_end=True)
    lab = load(folder, vision=made.write_tower(tmp_path / "clip", parts))
    agrees(lab, parts)
    lab.model.save_pretrained(tmp_path / "hf")
    lab.processor.save_pretrained(tmp_path / "hf")
    for one in (lab, load(tmp_path / "hf")):
        for prompt in ("llava-1.5", "hf", "chat"):
            run = one.ask(picture, QUESTION, prompt=prompt, max_new_tokens=3)
            start, stop = run.segments["image"]
            assert (run.tokens[start - 1], run.tokens[stop]) == ("<im_start>", "<im_end>")
            assert run.token_ids[[start - 1, stop]].tolist() == [WORDS - 2, WORDS - 1]
    ids = torch.from_numpy(run.token_ids)[None]
    given = lab.inputs(run)["pixel_values"]
    close(made.logits(lab.model, ids, given), made.logits(parts.model, ids, given), terms=64 * 2)


def test_marks_without_a_row_are_no_random_words(tmp_path: Path, parts: Parts) -> None:
    base = made.write_language(tmp_path / "base", parts)
    folder = made.write_projector_only(tmp_path / "projector", parts, mm_use_im_start_end=True)
    with pytest.raises(CheckpointError, match="<im_start> and <im_end> among them"):
        load(folder, base=base, vision=made.write_tower(tmp_path / "clip", parts))


def test_a_lora_run_is_merged_into_its_base(tmp_path: Path, parts: Parts) -> None:
    base = made.write_lora(tmp_path / "lora", parts)
    language = made.write_language(tmp_path / "vicuna", parts, base)
    lab = load(tmp_path / "lora", base=language, vision=made.write_tower(tmp_path / "clip", parts))
    agrees(lab, parts)
    assert f"LoRA over {language}" in lab.card.source


def test_a_lora_s_base_may_be_a_llava_and_be_named_by_its_files(tmp_path: Path, parts: Parts) -> None:
    base = made.write_lora(tmp_path / "lora", parts)
    other = made.make_parts(seed=8)
    whole = made.write_whole(tmp_path / "llava", Parts(other.model, other.kind, base, other.projector, other.vision))
    adapter = tmp_path / "lora" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace("lmsys/vicuna-7b-v1.5", str(whole)))
    agrees(load(tmp_path / "lora", vision=made.write_tower(tmp_path / "clip", parts)), parts)


def test_a_projector_alone_is_put_on_its_base(tmp_path: Path, parts: Parts) -> None:
    folder = made.write_projector_only(tmp_path / "stage1", parts)
    language = made.write_language(tmp_path / "vicuna", parts)
    lab = load(folder, base=language, vision=made.write_tower(tmp_path / "clip", parts))
    agrees(lab, parts)
    assert lab.card.fit == "crop"  # stage 1 does not pad
    assert f"projector only over {language}" in lab.card.source


def test_an_answer_and_its_record_are_the_original_s(tmp_path: Path, parts: Parts, picture: np.ndarray) -> None:
    lab = load(made.write_whole(tmp_path / "llava", parts), vision=made.write_tower(tmp_path / "clip", parts))
    run = lab.ask(picture, QUESTION, max_new_tokens=3)
    assert run.prompt.startswith("A chat between a curious user and an artificial intelligence assistant. The assistant gives")
    assert run.prompt.endswith(f"USER: <image>\n{QUESTION} ASSISTANT:")
    assert (run.options["fit"], run.options["prompt"], len(run.image_positions)) == ("pad", "llava-1.5", 16)
    assert lab.sequence(QUESTION, prompt="chat").text == run.prompt
    again = lab.ask(picture, QUESTION, max_new_tokens=1, prompt="chat", history=[("Is it red?", "Yes")])
    assert again.prompt == lab.sequence(QUESTION, history=[("Is it red?", "Yes")]).text


def test_new_words_are_drawn_from_the_old_ones_and_always_the_same(tmp_path: Path, parts: Parts) -> None:
    folder, tower = made.write_whole(tmp_path / "llava", parts), made.write_tower(tmp_path / "clip", parts)
    first, second = (original.assemble(folder, vision=tower).weights for _ in range(2))
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(first[name], second[name])
        old = parts.language["model.embed_tokens.weight"]
        assert torch.allclose(first[name][WORDS:], old.mean(0).expand(ROWS - WORDS, -1), atol=0.02)
        assert not torch.equal(first[name][WORDS], first[name][WORDS + 1])


def test_new_rows_have_the_mean_and_a_hundred_thousandth_of_the_covariance() -> None:
    old = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) @ torch.tensor([[2.0, 1, 0], [0, 1, 1], [0, 0, 3]]) + 7
    drawn = new_rows(old, 200_000, torch.Generator().manual_seed(2))
    wanted = 1e-5 * torch.cov(old.T, correction=0)
    assert torch.allclose(drawn.mean(0), old.mean(0), atol=1e-4)
    assert torch.allclose(torch.cov(drawn.T), wanted, atol=0.03 * wanted.abs().max().item())


def test_a_patch_token_comes_before_the_image_token(tmp_path: Path, parts: Parts) -> None:
    folder = made.write_whole(tmp_path / "llava", parts, mm_use_im_patch_token=True)
    lab = load(folder, vision=made.write_tower(tmp_path / "clip", parts))
    assert lab.tokenizer.convert_tokens_to_ids(["<im_patch>", "<image>", "<pad>"]) == [400, 401, 402]


@pytest.mark.parametrize("write", [made.write_whole, made.write_projector_only])
def test_reading_leaves_the_folder_as_it_was(tmp_path: Path, parts: Parts, write: Callable[..., Path]) -> None:
    folder, language = write(tmp_path / "llava", parts), made.write_language(tmp_path / "vicuna", parts)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    base: dict[str, Any] = {"base": language} if write is made.write_projector_only else {}
    load(folder, vision=made.write_tower(tmp_path / "clip", parts), **base)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("width", "inner", "layers", "kind", "parameters"),
    [
        (4096, 11008, 32, "mlp2x_gelu", 7_063_427_072),
        (4096, 11008, 32, "linear", 7_046_645_760),
        (5120, 13824, 40, "mlp2x_gelu", None),
    ],
)
def test_true_sizes_become_the_hub_s_model(
    tmp_path: Path, parts: Parts, width: int, inner: int, layers: int, kind: str, parameters: int | None
) -> None:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 32000}
    sizes |= {"num_attention_heads": width // 128, "num_key_value_heads": width // 128, "mm_hidden_size": 1024}
    made.write_json(tmp_path / "config.json", made.config_of(parts, mm_projector_type=kind, **sizes))
    read = original.read(tmp_path)
    tower = original.vision_config(read, None)
    config = original.llava_config(read, tower, vocabulary=32064, image_id=32000, pad_id=32001)
    with torch.device("meta"), connectors.patched():
        model = LlavaForConditionalGeneration(config)
    assert config.image_seq_length == 576
    assert tuple(model.lm_head.weight.shape) == (32064, width)
    if parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.fixture
def tower(tmp_path: Path, parts: Parts) -> Path:
    return made.write_tower(tmp_path / "clip", parts)


@pytest.fixture
def whole(tmp_path: Path, parts: Parts) -> Path:
    return made.write_whole(tmp_path / "llava", parts)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_missing_shard_is_named(whole: Path, tower: Path) -> None:
    (whole / "pytorch_model-00002-of-00002.bin").unlink()
    assert "lacks 1 of 2 weight files: pytorch_model-00002-of-00002.bin" in refused(whole, vision=tower)


def test_a_truncated_file_is_named(whole: Path, tower: Path) -> None:
    file = whole / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:5000])
    assert "pytorch_model-00001-of-00002.bin is cut off" in refused(whole, vision=tower)


def test_an_absent_tower_is_named_with_the_way_out(whole: Path) -> None:
    change(whole / "config.json", mm_vision_tower="/nowhere/clip")
    text = refused(whole)
    assert "'/nowhere/clip'" in text
    assert "--vision" in text


def test_a_tower_of_another_width_is_refused(whole: Path, tower: Path) -> None:
    change(whole / "config.json", mm_hidden_size=1024)
    assert "vision features 1024 wide (mm_hidden_size)" in refused(whole, vision=tower)


def test_a_projector_of_another_width_is_refused_with_both_shapes(tmp_path: Path, parts: Parts, tower: Path) -> None:
    wide = Parts(parts.model, parts.kind, parts.language, {**parts.projector, "0.weight": torch.zeros(64, 48)}, parts.vision)
    text = refused(made.write_whole(tmp_path / "wide", wide), vision=tower)
    assert "linear_1.weight (64, 48) not (64, 32)" in text


def test_an_mlp_that_the_config_calls_linear_is_refused(whole: Path, tower: Path) -> None:
    change(whole / "config.json", mm_projector_type="linear")
    assert "does not hold a linear projector" in refused(whole, vision=tower)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_projector_type": "qformer"}, "unknown mm_projector_type"),
        ({"mm_projector_type": "resampler"}, "LLaVA has linear, identity"),
        ({"image_aspect_ratio": "anyres"}, "tiles"),
        ({"model_type": "llava_mistral"}, "'llava_mistral'"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer"),
        ({"mm_vision_select_feature": "all"}, "'all'"),
        ({"hidden_size": 128}, "128 (language)"),
    ],
)
def test_settings_that_are_not_llava_1_5_s_are_named(whole: Path, tower: Path, changes: dict[str, Any], said: str) -> None:
    change(whole / "config.json", **changes)
    assert said in refused(whole, vision=tower)


def test_a_missing_and_an_unknown_tensor_are_named(whole: Path, tower: Path) -> None:
    file = next(file for file in whole.glob("pytorch_model-*.bin") if "lm_head.weight" in torch.load(file))
    tensors = torch.load(file)
    head = tensors.pop("lm_head.weight")
    torch.save(tensors, file)
    assert "1 missing: lm_head.weight" in refused(whole, vision=tower)
    torch.save(tensors | {"lm_head.weight": head, "model.strange.weight": head}, file)
    assert "1 unexpected: model.strange.weight" in refused(whole, vision=tower)


def test_mixed_spellings_are_refused(whole: Path, tower: Path) -> None:
    file = whole / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(file) | {"multi_modal_projector.linear_1.bias": torch.zeros(64)}, file)
    assert "mixes two spellings" in refused(whole, vision=tower)


def test_a_lora_without_its_base_or_its_projector_is_refused(tmp_path: Path, parts: Parts, tower: Path) -> None:
    base = made.write_lora(tmp_path / "lora", parts)
    adapter = tmp_path / "lora" / "adapter_config.json"
    change(adapter, base_model_name_or_path="/nowhere/vicuna")
    assert "--base" in (text := refused(tmp_path / "lora", vision=tower))
    assert "/nowhere/vicuna" in text
    language = made.write_language(tmp_path / "vicuna", parts, base)
    change(adapter, use_dora=True)
    assert "no plain LoRA (use_dora)" in refused(tmp_path / "lora", vision=tower, base=language)
    change(adapter, use_dora=False)
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    assert "has no non_lora_trainables.bin" in refused(tmp_path / "lora", vision=tower, base=language)


def test_a_step_of_a_lora_run_says_what_it_is_and_where_the_rest_lies(tmp_path: Path, parts: Parts, tower: Path) -> None:
    made.write_lora(tmp_path / "lora", parts)
    step = tmp_path / "lora" / "checkpoint-500"
    step.mkdir()
    for name in ("adapter_model.bin", "adapter_config.json"):
        shutil.copy(tmp_path / "lora" / name, step)
    text = refused(step)
    assert "has no config.json and no non_lora_trainables.bin: it holds the LoRA adapter of a step (adapter_model.bin)" in text
    assert f"it is in {tmp_path / 'lora'}: load that folder" in text
    shutil.copy(tmp_path / "lora" / "config.json", step)
    assert "without the trained projector" in refused(step, vision=tower)
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    assert "LLaVA writes it beside them when a run ends" in refused(step, vision=tower)


def test_a_base_of_another_size_is_refused(tmp_path: Path, parts: Parts, tower: Path) -> None:
    folder = made.write_projector_only(tmp_path / "stage1", parts)
    language = made.write_language(tmp_path / "vicuna", parts, hidden_size=5120)
    assert "hidden_size 64, the base" in refused(folder, vision=tower, base=language)


def test_options_of_the_original_format_are_refused_elsewhere(whole: Path, tower: Path, tiny_folder: Path) -> None:
    assert "leave base out" in refused(whole, OptionError, vision=tower, base=tower)
    assert "is whole" in refused(tiny_folder, OptionError, vision=tower)


def test_code_in_a_projector_file_is_refused(tmp_path: Path, parts: Parts, tower: Path) -> None:
    folder = made.write_projector_only(tmp_path / "stage1", parts)
    torch.save({"model.mm_projector.0.weight": Path}, folder / "mm_projector.bin")
    language = made.write_language(tmp_path / "vicuna", parts)
    assert "mm_projector.bin is cut off, damaged, or holds more than weights" in refused(folder, vision=tower, base=language)


def test_a_sentencepiece_tokenizer_without_its_packages_is_one_line(
    whole: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole / "tokenizer.json").rename(whole / "tokenizer.model")
    monkeypatch.setattr("llava_lab.models.formats.original.is_sentencepiece_available", lambda: False)
    assert "pip install sentencepiece protobuf" in refused(whole, vision=tower)
    (whole / "tokenizer.model").unlink()
    assert "has no tokenizer" in refused(whole, vision=tower)


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair model trained with Llama's settings, and Vicuna's tokenizer_config.json."""
    made = tmp_path_factory.mktemp("words")
    lines = [f"What color is the car number {i}? The car is red. USER: hello ASSISTANT: yes" for i in range(300)]
    (made / "corpus.txt").write_text("\n".join(lines), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(made / "corpus.txt"),
        model_prefix=str(made / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    marks = {
        name: {**SPECIAL, "content": text} for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **marks}
    (made / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None, "model_max_length": 2048}), "utf-8")
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_sentencepiece_s_own(words_folder: Path, text: str) -> None:
    words = read_tokenizer(words_folder, patch_token=False)
    expected = sentencepiece.SentencePieceProcessor(str(words_folder / "tokenizer.model")).encode(text)
    assert words(text)["input_ids"] == [1, *expected]


def test_image_and_pad_come_after_the_last_word(words_folder: Path) -> None:
    words = read_tokenizer(words_folder, patch_token=False)
    assert words.convert_tokens_to_ids(["<image>", "<pad>"]) == [320, 321]
    assert words("<image>\nWhat")["input_ids"][:2] == [1, 320]
    assert words.pad_token_id == 321


def test_a_damaged_file_is_one_line(words_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((words_folder / "tokenizer.model").read_bytes()[:500])
    (tmp_path / "tokenizer_config.json").write_bytes((words_folder / "tokenizer_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        read_tokenizer(tmp_path, patch_token=False)
    assert "\n" not in str(caught.value)
