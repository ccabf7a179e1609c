"""What a page runs is the model: the same tokens, logits, states, attention and sizes, before export and after."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llava_lab as ll
from llava_lab.capture import undisturbed, watch_attention
from llava_lab.capture.reducers import Full
from llava_lab.errors import OptionError
from llava_lab.models import Lab
from llava_lab.models.layout import language_layers
from llava_lab.page.graphs import Answer, Read, agreement, ask, check_model, engine, export, in_16_bits, torch_engine
from llava_lab.results import Run
from llava_lab.worlds.picturebook import scene

SAME = 1e-4  # float32, sums in another order


@pytest.fixture(scope="module")
def tiny() -> Lab:
    return ll.load("tiny")


@pytest.fixture(scope="module")
def both(tiny: Lab) -> tuple[Run, Answer]:
    """One caption, by the lab and by the modules that are exported."""
    picture = np.asarray(scene("test", 0).picture())
    run = tiny.ask(picture, "Describe the picture.")
    return run, ask(tiny, torch_engine(tiny), tiny.pixels(picture), run.question)


def test_tokens_are_the_model_s_and_logits_within_rounding(tiny: Lab) -> None:
    found = agreement(tiny, torch_engine(tiny), scenes=2)
    assert found.questions == 6
    assert found.tokens > 20
    assert found.same
    assert found.logits < SAME


def test_attention_and_sizes_row_by_row_are_those_of_one_whole_forward(tiny: Lab, both: tuple[Run, Answer]) -> None:
    run, given = both
    layers = language_layers(tiny.model)
    with undisturbed(tiny.model), watch_attention(layers, Full()) as seen:
        tiny.model(**tiny.inputs(run), use_cache=False)
    assert len(given.attention) == len(run.token_ids)  # what would close the answer was read from its last token
    for layer in range(len(layers)):
        whole = seen.attention[layer][0].mean(0).numpy()
        norms = seen.layer_norms[layer]
        sizes = torch.stack([norms.branch[0], norms.stream[0]], -1).numpy()
        np.testing.assert_allclose(given.sizes[layer], sizes, rtol=1e-4)
        for row, attention in enumerate(given.attention):
            np.testing.assert_allclose(attention[layer], whole[row, : row + 1], atol=1e-6)


def test_any_state_is_read_as_the_logit_lens_reads_it(tiny: Lab, both: tuple[Run, Answer]) -> None:
    run, given = both
    lens = ll.logit_lens(tiny, run, top=1)
    start, stop = run.segments["image"]
    with torch.no_grad():
        for state in range(len(given.states)):
            logits = Read(tiny)(torch.from_numpy(given.states[state, start:stop]))
            assert logits.argmax(-1).tolist() == lens.top_ids[state, :, 0].tolist()


def test_how_far_a_picture_is_from_the_training_s_is_what_a_run_would_say(tiny: Lab) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    run = tiny.ask(noise, "What color is the car?", max_new_tokens=1)
    (told,) = [note for note in run.notes if "Unlike" in note]
    distance = ask(tiny, torch_engine(tiny), tiny.pixels(noise), run.question).distance
    assert f"{distance:.1f} times" in told


def test_weights_keep_their_values_in_16_bits_and_one_too_large_is_refused(tiny: Lab) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    def model(values: np.ndarray) -> bytes:
        weight = numpy_helper.from_array(values, "w")
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 64]) for name in "xy"]
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        return in_16_bits(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight])))

    weights = tiny.connector.linear_2.weight.detach().numpy()[:64, :64]
    kept = onnx.load_from_string(model(weights)).graph
    assert [(node.op_type, list(node.output)) for node in kept.node] == [("Cast", ["w"]), ("MatMul", ["y"])]
    np.testing.assert_allclose(numpy_helper.to_array(kept.initializer[0]).astype(np.float32), weights, atol=3e-8, rtol=0)
    with pytest.raises(ll.LabError, match="too large for 16 bits"):
        model(np.full((64, 64), 1e6, np.float32))


def test_a_model_that_a_page_cannot_hold_is_refused_in_one_line(tiny_random: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    check_model(tiny_random)
    monkeypatch.setattr(tiny_random.model.config.text_config, "model_type", "mistral")
    with pytest.raises(OptionError, match="CLIP vision tower and a Llama"):
        check_model(tiny_random)


@pytest.mark.long
def test_the_exported_files_give_the_same_answers(tiny: Lab) -> None:
    graphs = export(tiny)
    assert sum(map(len, graphs.values())) < 15_000_000
    found = agreement(tiny, engine(graphs))
    assert (found.questions, found.same) == (18, True)
    assert found.logits < SAME
