"""Loading: exactly what was saved or one clear line. The 7B's path is the same path: LLaVA-1.5's config keys, files and geometry,
with few and narrow layers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

import llava_lab as ll
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import Lab, layout, load
from llava_lab.results import Run
from tests.support.answers import probabilities_check_out
from tests.support.checkpoints import build_llava
from tests.support.families import family
from tests.support.refusals import refused

LINEAR_1 = "multi_modal_projector.linear_1.weight"
QUESTION = "What color is the car?"


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_loaded_weights_are_the_saved_ones_bitwise(tiny_folder: Path, tiny_random: Lab) -> None:
    saved = load_file(tiny_folder / "model.safetensors")
    state = tiny_random.model.state_dict()
    assert len(saved) == len(state)
    assert torch.equal(state["model.multi_modal_projector.linear_1.weight"], saved[LINEAR_1])
    mine = sorted(value.double().sum().item() for value in state.values())
    assert mine == sorted(value.double().sum().item() for value in saved.values())


def test_the_model_comes_ready_and_unlearning(tiny_random: Lab) -> None:
    assert not tiny_random.model.training
    assert not any(parameter.requires_grad for parameter in tiny_random.model.parameters())
    assert tiny_random.grid == (4, 4)
    assert (tiny_random.device.type, tiny_random.dtype) == ("cpu", torch.float32)


def test_loading_changes_no_settings_and_prints_nothing(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def settings() -> tuple[Any, ...]:
        bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
        return torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist(), bars, level

    before = settings()
    load(tiny_folder)
    assert settings() == before
    assert capfd.readouterr() == ("", "")


def test_the_card_says_what_was_loaded_and_why(tiny_folder: Path, tiny_random: Lab) -> None:
    card = tiny_random.card
    assert card.source == f"folder {tiny_folder}"
    assert card.connector == "mlp2x_gelu"
    assert (card.image_tokens, card.fit, card.dtype, card.attention) == (16, "pad", "float32", "sdpa")
    assert card.parameters == sum(p.numel() for p in tiny_random.model.parameters())
    assert "float32: 0.2M parameters fit easily" in card.why
    assert card.licence == "not stated"
    assert all(str(value).split()[0] in card.describe() for value in card.to_dict().values() if isinstance(value, str))
    assert json.dumps(card.to_dict())


def test_licence_and_origin_come_from_the_readme_head(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "README.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- a/b\n- c/d\ntags: [x]\n---\nlicense: not this\n")
    card = load(copy).card
    assert (card.licence, card.origin, card.non_commercial) == ("apache-2.0", "a/b", False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("head", ["license: cc-by-nc-4.0", "license: other\nlicense_name: some-non-commercial-terms"])
def test_a_non_commercial_licence_is_shown_when_the_model_loads(copy: Path, caplog: pytest.LogCaptureFixture, head: str) -> None:
    (copy / "README.md").write_text(f"---\n{head}\n---\n")
    lab = load(copy)
    assert lab.card.non_commercial
    assert "non-commercial licence" in caplog.text
    assert lab.card.licence in caplog.text


def test_dtype_attention_and_device_are_taken_as_asked(tiny_folder: Path, picture: np.ndarray) -> None:
    lab = load(tiny_folder, dtype="bfloat16", attention="eager", device="cpu")
    assert lab.dtype == torch.bfloat16
    assert lab.model.config._attn_implementation == "eager"
    assert lab.card.why == "cpu: as asked; bfloat16: as asked"
    assert lab.ask(picture, "What?", max_new_tokens=2).logprobs.dtype == np.float32


def test_unusable_options_list_what_there_is(tiny_folder: Path) -> None:
    assert "float32, bfloat16, float16" in refused(tiny_folder, OptionError, dtype="int8")
    assert "eager" in refused(tiny_folder, OptionError, attention="flash")
    assert "usable: cpu" in refused(tiny_folder, OptionError, device="cuda")
    assert "'cpu'" in refused(tiny_folder, OptionError, device="gpu")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("torch_dtype", torch.bfloat16, ("bfloat16", "sdpa")),
        ("torch_dtype", "auto", ("float32", "sdpa")),
        ("dtype", "torch.bfloat16", ("bfloat16", "sdpa")),
        ("dtype", "bf16", ("bfloat16", "sdpa")),
        ("dtype", "fp16", ("float16", "sdpa")),
        ("attn_implementation", "eager", ("float32", "eager")),
        ("load_in_4bit", False, ("float32", "sdpa")),
        ("load_8bit", None, ("float32", "sdpa")),
        ("trust_remote_code", False, ("float32", "sdpa")),
        ("device_map", None, ("float32", "sdpa")),
        ("attention", None, ("float32", "sdpa")),
    ],
)
def test_options_are_taken_by_the_names_people_know(
    tiny_folder: Path, option: str, value: Any, expected: tuple[str, str]
) -> None:
    lab = load(tiny_folder, **{option: value})
    assert (str(lab.dtype), lab.model.config._attn_implementation) == (f"torch.{expected[0]}", expected[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torch_dtype": "int8"}, "dtype must be None or one of"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "torch_dtype and dtype say the same"),
        ({"load_in_4bit": True}, "quantization_config=BitsAndBytesConfig cannot be used here"),
        ({"load_8bit": True}, "quantization_config=BitsAndBytesConfig cannot be used here"),
        ({"use_flash_attention_2": True}, "use attention='flash_attention_2'"),
        ({"trust_remote_code": True}, "nothing that comes with a checkpoint is run"),
        ({"cache_dir": "x"}, "HF_HUB_CACHE"),
        ({"local_files_only": True}, "HF_HUB_OFFLINE"),
        ({"token": "x"}, "HF_TOKEN"),
        ({"output_attentions": True}, "ll.head_maps"),
        ({"model_base": "x"}, "vision and base belong to a folder of the original LLaVA"),
        ({"vision_tower": "x"}, "vision and base belong to a folder of the original LLaVA"),
        (
            {"tempertaure": 1},
            "whose options are device, dtype, attention, vision, base, device_map, quantization_config, revision",
        ),
        ({"revision": "main"}, "has no revision"),
    ],
)
def test_what_others_have_and_we_have_not_is_answered_with_ours(tiny_folder: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(tiny_folder, OptionError, **options)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Tiny", "tiny"),
        ("tiny ", "tiny"),
        ("tinny", "tiny"),
        ("tiny@main", "tiny"),
        ("TINY_MLP", "tiny-mlp"),
        ("tiny linear", "tiny-linear"),
        ("smoll", "smol"),
        ("https://huggingface.co/llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("https://huggingface.co/llava-hf/llava-1.5-7b-hf/tree/main", "llava-hf/llava-1.5-7b-hf"),
        ("huggingface.co/liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.5-7b"),
        ("hf.co/llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("", None),
        (" ", None),
        ("gpt-4o", None),
        ("a/b/c/d", None),
    ],
)
def test_a_name_that_is_none_is_told_with_the_one_that_was_meant(name: str, meant: str | None) -> None:
    with pytest.raises(CheckpointError, match="^no model '.*': it is neither") as error:
        load(name)
    assert str(error.value).endswith(f"; did you mean {meant!r}?" if meant else "'llava-hf/llava-1.5-7b-hf'")


@pytest.mark.parametrize("layer", [-6, 5, 99, [-2, 9], [], "last", 1.5, None, True])
def test_a_feature_layer_outside_the_tower_is_refused_at_load(copy: Path, layer: Any) -> None:
    edit_json(copy / "config.json", vision_feature_layer=layer)
    refused(copy)


def test_several_templates_are_one_by_its_name(copy: Path, picture: np.ndarray) -> None:
    both = [
        {"name": "tool_use", "template": "{{ 1 }}"},
        {"name": "default", "template": "<image>{{ messages[0].content[1].text }}:"},
    ]
    for several in (both, {entry["name"]: entry["template"] for entry in both}):
        edit_json(copy / "processor_config.json", chat_template=several)
        lab = load(copy)
        assert lab.prompt == "chat"  # its turns are not Vicuna's, so its own form stands
        assert lab.ask(picture, "What?", max_new_tokens=1).prompt == "<image>What?:"
    for wrong in ([{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}], 5, ["a"]):
        edit_json(copy / "processor_config.json", chat_template=wrong)
        assert "chat_template that is no text" in refused(copy)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('no roles') }}",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.at_all }}",
        "{{ messages[9].content }}",
        "{% include 'other' %}",
        "<image>",
        "{{ messages[0].content[1].text }}",
        "<image><image>{{ messages[0].content[1].text }}",
        "<image>{{ messages[0].content[1].text | upper }}",
        "{{ messages | tojson(9) }}",
        "{% for message in messages %}{{ message.content + 1 }}{% endfor %}",
        "{{ messages[0].foo() }}",
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(tiny_random.processor, "chat_template", template)
    monkeypatch.setattr(tiny_random, "foreign", False)  # a stranger's runs in a process of its own, which has its own tests
    with pytest.raises(CheckpointError, match=r"template|prompt must hold") as error:
        tiny_random.sequence("What is it?", prompt="chat")
    assert "\n" not in str(error.value)


def test_other_families_and_half_an_original_are_refused(copy: Path) -> None:
    edit_json(copy / "config.json", model_type="llama")
    assert "'llama'" in refused(copy)
    edit_json(copy / "config.json", model_type="llava_llama", mm_vision_tower="openai/clip")
    assert "mm_vision_select_layer" in refused(copy)


def test_broken_files_are_named(copy: Path) -> None:
    weights, config = (copy / "model.safetensors").read_bytes(), (copy / "config.json").read_text()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors" in refused(copy) or "damaged" in refused(copy)
    (copy / "model.safetensors").write_bytes(b"\xff" * 40)
    assert "not a whole safetensors file" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert "no weights" in refused(copy)
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "config.json").write_text(config[:50])
    assert "not readable JSON" in refused(copy)
    (copy / "config.json").write_text("[]")
    assert "JSON object" in refused(copy)
    (copy / "config.json").write_text(config.replace('"llama"', '"no-such-model"'))
    assert "does not describe a LLaVA" in refused(copy)
    (copy / "config.json").write_text(config)
    (copy / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refused(copy)


def test_processor_files_that_are_missing_or_of_another_model_are_refused(copy: Path) -> None:
    settings = json.loads((copy / "processor_config.json").read_text())
    edit_json(
        copy / "processor_config.json", image_processor=settings["image_processor"] | {"crop_size": {"height": 24, "width": 24}}
    )
    assert "24 px" in refused(copy)
    (copy / "processor_config.json").unlink()
    assert "image processor" in refused(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(LINEAR_1), "1 missing: model.multi_modal_projector.linear_1.weight"),
        (
            lambda weights: weights.update({"multi_modal_projector.linear_3.weight": torch.zeros(2)}),
            "1 unexpected: model.multi_modal_projector.linear_3.weight",
        ),
        (
            lambda weights: weights.update({LINEAR_1: torch.zeros(64, 33)}),
            "1 misshapen: model.multi_modal_projector.linear_1.weight (64, 33) not (64, 32)",
        ),
        (lambda weights: [weights.pop(name) for name in list(weights) if "vision_tower" in name], " more"),
    ],
    ids=["missing", "unexpected", "misshapen", "many"],
)
def test_weights_that_do_not_fit_are_named(copy: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str) -> None:
    edit_weights(copy, change)
    assert said in refused(copy)


PARTS = (LINEAR_1, "embed_tokens", "lm_head", "class_embedding", "patch_embedding", "down_proj", "layers.0.input_layernorm")


@family("value", [float("nan"), float("inf"), float("-inf")], quick=1, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_a_weight_that_is_not_finite_is_named(copy: Path, part: str, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in sorted(weights.items()) if part in name).view(-1)[-1] = value

    edit_weights(copy, spoil)
    found = refused(copy)
    assert found.startswith(f"expected finite weights in {copy}, got NaN or infinity in ")
    assert part in found
    assert "(1 of " in found


def test_constants_of_old_checkpoints_are_no_surprise(copy: Path, tiny_random: Lab) -> None:
    computed = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    edit_weights(copy, lambda weights: weights.update(computed))
    assert load(copy).fingerprint == tiny_random.fingerprint


def test_a_config_whose_image_id_is_not_the_tokenizer_s_is_refused(copy: Path) -> None:
    edit_json(copy / "config.json", image_token_index=5)
    assert "image_token_index 5" in refused(copy)


def test_a_checkpoint_that_keeps_the_class_token_is_refused(tmp_path: Path) -> None:
    assert "17 image tokens of 4x4 patches" in refused(build_llava(tmp_path / "full", feature_strategy="full"))


def test_several_feature_layers_and_a_biasless_connector_load(tmp_path: Path, picture: np.ndarray) -> None:
    lab = load(build_llava(tmp_path / "several", feature_layer=[-2, -3], projector_bias=False))
    assert lab.ask(picture, "What?", max_new_tokens=2).segments["image"][1] > 0


def test_pytorch_weights_load_when_there_is_no_safetensors(copy: Path, tiny_random: Lab) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    assert load(copy).fingerprint == tiny_random.fingerprint


def test_safetensors_is_preferred_over_pytorch_weights(copy: Path, tiny_random: Lab) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    assert load(copy).fingerprint == tiny_random.fingerprint


class Trap:
    """What an attacker would pickle into a weight file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import os; os.environ['LLAVA_LAB_TRAP'] = 'sprung'",)


@pytest.mark.parametrize("save", [torch.save, lambda data, path: Path(path).write_bytes(pickle.dumps(data, protocol=2))])
def test_code_in_a_weight_file_is_refused_and_not_run(copy: Path, save: Callable[[Any, Any], Any]) -> None:
    (copy / "model.safetensors").unlink()
    save({"lm_head.weight": Trap()}, copy / "pytorch_model.bin")
    assert "more than weights" in refused(copy)
    assert "LLAVA_LAB_TRAP" not in os.environ


def test_code_beside_a_checkpoint_is_never_asked_for_or_run(copy: Path, tiny_random: Lab) -> None:
    (copy / "evil.py").write_text("import os; os.environ['LLAVA_LAB_TRAP'] = 'sprung'")
    remote = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]}
    edit_json(copy / "config.json", auto_map=remote)
    edit_json(copy / "tokenizer_config.json", auto_map=remote)
    config = json.loads((copy / "config.json").read_text())
    edit_json(copy / "config.json", text_config=config["text_config"] | {"auto_map": remote})
    assert load(copy).fingerprint == tiny_random.fingerprint
    assert "LLAVA_LAB_TRAP" not in os.environ


def test_two_spellings_in_one_folder_are_refused(copy: Path) -> None:
    edit_weights(copy, lambda weights: weights.update({"model." + LINEAR_1: weights[LINEAR_1].clone()}))
    assert "mix two spellings" in refused(copy)


def test_names_as_in_memory_and_sharded_pytorch_weights_load(copy: Path, tiny_random: Lab) -> None:
    (copy / "model.safetensors").unlink()
    state = tiny_random.model.state_dict()
    where: dict[str, str] = {}
    for number in range(2):
        file = f"pytorch_model-{number + 1:05}-of-00002.bin"
        part = {name: state[name] for name in sorted(state)[number::2]}
        torch.save(part, copy / file)
        where |= dict.fromkeys(part, file)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert load(copy).fingerprint == tiny_random.fingerprint


@pytest.fixture(scope="module")
def hub(llava15_folder: Path) -> Lab:
    return ll.load(str(llava15_folder))


@pytest.fixture(scope="module")
def hub_run(hub: Lab) -> Run:
    pixels = np.random.default_rng(1).integers(0, 256, (300, 480, 3), dtype=np.uint8)
    return hub.ask(pixels, QUESTION, max_new_tokens=6)


def test_the_folder_is_laid_out_as_the_hub_s(llava15_folder: Path) -> None:
    config = json.loads((llava15_folder / "config.json").read_text())
    assert (config["image_token_index"], config["image_seq_length"], config["pad_token_id"]) == (32000, 576, 32001)
    assert config["text_config"]["vocab_size"] == 32064
    assert (config["vision_config"]["image_size"], config["vision_config"]["patch_size"]) == (336, 14)
    index = json.loads((llava15_folder / "model.safetensors.index.json").read_text())
    assert any(name.startswith("vision_tower.vision_model.encoder") for name in index["weight_map"])
    assert "image_processor" not in json.loads((llava15_folder / "processor_config.json").read_text())


def test_it_loads_whole_with_576_image_tokens(hub: Lab) -> None:
    assert hub.grid == (24, 24)
    assert layout.image_token_count(hub.model) == 576
    assert (hub.card.licence, hub.card.connector, hub.card.fit) == ("llama2", "mlp2x_gelu", "crop")
    assert hub.dtype == torch.float32  # stored as float16; small enough to be exact
    assert hub.context == 4096


def test_its_run_has_576_image_positions_found_by_their_id(hub: Lab, hub_run: Run) -> None:
    assert len(hub_run.image_positions) == 576
    assert (hub_run.token_ids[hub_run.image_positions] == 32000).all()
    assert (np.delete(hub_run.token_ids, hub_run.image_positions) != 32000).all()
    assert (hub_run.map.rows, hub_run.map.cols, hub_run.map.size, hub_run.map.mode) == (24, 24, 336, "crop")


def test_its_tokens_are_the_transformers_processor_s_own(hub: Lab, llava15_folder: Path) -> None:
    theirs = AutoProcessor.from_pretrained(llava15_folder)
    found = hub.sequence(QUESTION)
    image = Image.new("RGB", (300, 200))
    assert theirs(text=found.text, images=image, return_tensors="np")["input_ids"][0].tolist() == found.token_ids.tolist()


def test_its_answer_equals_stock_transformers(hub: Lab, hub_run: Run, llava15_folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava15_folder, dtype=torch.float32)
    inputs = AutoProcessor.from_pretrained(llava15_folder)(
        text=hub_run.prompt, images=Image.fromarray(hub_run.picture), return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert out[0].tolist() == hub_run.token_ids.tolist()


def test_teacher_forcing_agrees_with_the_answer(hub: Lab, hub_run: Run) -> None:
    probabilities_check_out(hub, hub_run)


def test_the_paper_s_padding_is_one_option_away(hub: Lab, hub_run: Run) -> None:
    padded = hub.ask(hub_run.picture, QUESTION, fit="pad", max_new_tokens=1)
    assert padded.map.mode == "pad"
    assert padded.map.seen_box == (0, 0, 480, 300)
    assert hub_run.map.seen_box != padded.map.seen_box
