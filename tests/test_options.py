"""Options by the names that other libraries give them are taken or answered with ours, a misspelt one is found."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest

import llava_lab as ll
from llava_lab.checks import known
from llava_lab.errors import OptionError
from llava_lab.options import INSTEAD, RENAMED, by_our_names, nearest
from llava_lab.results import Run

QUESTION = "What is it?"
Asked = dict[str, Any]


def asked(picture: np.ndarray, **changed: Any) -> Asked:
    """How `ask` is called, every argument by name."""
    return {"picture": picture, "question": QUESTION, "max_new_tokens": 2, **changed}


def renamed(given: Asked, ours: str, theirs: str) -> Asked:
    return {theirs if name == ours else name: value for name, value in given.items()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("max_tokens", "max_new_tokens"),
        ("max_completion_tokens", "max_new_tokens"),
        ("max_output_tokens", "max_new_tokens"),
        ("num_predict", "max_new_tokens"),
        ("image", "picture"),
        ("images", "picture"),
        ("pictures", "picture"),
        ("img", "picture"),
        ("image_file", "picture"),
        ("image_path", "picture"),
        ("text", "question"),
        ("query", "question"),
        ("questions", "question"),
        ("instruction", "question"),
        ("random_seed", "seed"),
        ("conversation", "history"),
        ("chat_history", "history"),
        ("callback", "on_token"),
    ],
)
def test_a_name_that_means_the_same_is_taken(tiny_random: ll.Lab, picture: np.ndarray, theirs: str, ours: str) -> None:
    heard: list[str] = []
    call = asked(picture, seed=1, history=[("Is it red?", "Yes.")], on_token=heard.append)
    wanted = tiny_random.ask(**call)
    run = tiny_random.ask(**renamed(call, ours, theirs))
    assert (run.prompt, run.answer, run.seed) == (wanted.prompt, wanted.answer, 1)
    assert run.token_ids.tolist() == wanted.token_ids.tolist()
    assert "".join(heard) == wanted.answer + run.answer


REFUSED: list[tuple[str, Any, str]] = [
    ("do_sample", True, "temperature=... above 0 draws"),
    ("max_length", 20, "max_new_tokens=... counts"),
    ("top_p", 0.9, "temperature="),
    ("top_k", 50, "temperature="),
    ("min_p", 0.1, "temperature="),
    ("num_beams", 4, "without beams"),
    ("early_stopping", True, "without beams"),
    ("repetition_penalty", 1.2, "none is raised or lowered"),
    ("frequency_penalty", 0.5, "none is raised or lowered"),
    ("logit_bias", {3: 1}, "none is raised or lowered"),
    ("stop", ["\n"], "max_new_tokens="),
    ("stop_strings", "\n", "max_new_tokens="),
    ("eos_token_id", 2, "max_new_tokens="),
    ("min_new_tokens", 3, "max_new_tokens="),
    ("n", 3, "another seed="),
    ("num_return_sequences", 2, "lab.ask_many"),
    ("stream", True, "on_token="),
    ("streamer", object(), "on_token="),
    ("logprobs", True, "run.logprobs"),
    ("output_attentions", True, "ll.head_maps"),
    ("messages", [{"role": "user", "content": "What?"}], "history="),
    ("system", "Be short.", "prompt="),
    ("conv_mode", "vicuna_v1", "prompt="),
    ("response_format", {"type": "json_object"}, "is text"),
    ("device", "cuda", "ll.load"),
    ("generation_config", object(), "max_new_tokens="),
]


def refusal(call: Any, **options: Any) -> str:
    with pytest.raises(OptionError) as error:
        call(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "value", "ours"), REFUSED)
def test_what_others_have_and_we_have_not_is_answered_with_ours(
    tiny_random: ll.Lab, picture: np.ndarray, name: str, value: Any, ours: str
) -> None:
    said = refusal(tiny_random.ask, **asked(picture), **{name: value})
    assert said.startswith(f"Lab.ask has no {name}: ")
    assert ours in said
    assert said.endswith("; leave it out")


def test_everyone_who_answers_says_the_same(tiny_random: Any, picture: np.ndarray) -> None:
    box = ll.BlackBox("a-model", "http://127.0.0.1:9/v1", cache=False)
    both = {"lab": tiny_random, "picture": picture, "question": QUESTION}
    for option, value, ours in REFUSED:
        assert ours in refusal(box.ask, picture=picture, question=QUESTION, **{option: value})
        assert ours in refusal(tiny_random.ask_many, pictures=[picture], questions=QUESTION, **{option: value})
        assert ours in refusal(ll.ask_and_attribute, **both, **{option: value})
    ask: Any = ll.ask_and_attribute
    run, _ = ask(tiny_random, image=picture, text=QUESTION, max_tokens=2)
    assert len(run.answer_positions) == 2
    runs = tiny_random.ask_many(images=[picture], text=[QUESTION], max_tokens=2, batch_size=1, verbose=False)
    assert [len(run.answer_positions) for run in runs] == [2]


NOTHING: list[Asked] = [
    {"do_sample": False},
    {"do_sample": False, "temperature": 0.0},
    {"num_beams": 1},
    {"top_p": None},
    {"top_p": 1.0},
    {"top_k": 0},
    {"repetition_penalty": 1.0},
    {"frequency_penalty": 0},
    {"n": 1},
    {"stop": None},
    {"stop": []},
    {"stream": False},
    {"use_cache": True},
    {"do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1, "use_cache": True},  # as LLaVA's own command does
]


@pytest.mark.parametrize("options", NOTHING, ids=str)
def test_what_asks_for_nothing_else_is_left_out(tiny_random: ll.Lab, picture: np.ndarray, options: Asked) -> None:
    assert tiny_random.ask(**asked(picture), **options).answer == tiny_random.ask(**asked(picture)).answer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 5}, "max_tokens and max_new_tokens say the same; use max_new_tokens=... alone"),
        ({"image": 1}, "image and picture say the same"),
        ({"text": "What?"}, "text and question say the same"),
        ({"seed": 1, "random_seed": 2}, "random_seed and seed say the same"),
        ({"random_state": 1, "random_seed": 2}, "say the same; use seed"),
        ({"do_sample": False, "temperature": 0.5}, "temperature=... above 0 draws"),
    ],
)
def test_what_is_said_twice_or_against_itself_is_refused(
    tiny_random: ll.Lab, picture: np.ndarray, options: Asked, words: str
) -> None:
    assert words in refusal(tiny_random.ask, **asked(picture), **options)


PASSED_ON = {  # to whom the options of these go, and who says so
    "new_connector": "connector 'linear' has no option ",
    "read_projector": ": options are those of a kind of connector; give kind=... too",
    "ask_and_attribute": "Lab.ask has no option ",
    "load": " belong to a model behind a server",
}
ENTRIES = [name for name in ll.__all__ if callable(getattr(ll, name)) and hasattr(getattr(ll, name), "__wrapped__")]


@pytest.mark.parametrize("name", ENTRIES)
def test_an_unknown_option_of_any_public_function_is_one_line_with_those_there_are(calls: dict[str, Asked], name: str) -> None:
    function = getattr(ll, name)

    def called(**options: Any) -> None:
        opened = function(**options)
        if isinstance(opened, AbstractContextManager):
            with opened:
                pass

    call = dict(calls[name])
    if name == "estimate":  # of a closed model alone
        call["lab"] = ll.BlackBox("a-model", "http://127.0.0.1:9/v1", cache=False)
    parameters = inspect.signature(function).parameters
    optional = [key for key in parameters if key in call and parameters[key].default is not inspect.Parameter.empty]
    option = max(optional or call, key=len)
    rest = {key: value for key, value in call.items() if key != option}
    wrong = option[:-1] + "xz"
    said = refusal(called, **rest, **{wrong: call[option]})
    assert wrong in said
    assert f"has no option {wrong!r}" in said or f"{name} needs {option}, got {wrong}" in said or PASSED_ON[name] in said
    assert "; did you mean '" in said or f"{name} needs {option}, got {wrong}" in said or len(option) < 4


PASSED_ON_AND_MISSPELT = [
    ("new_connector", {"kind": "mlp2x_gelu", "widht": 8}, "width"),
    ("new_connector", {"kind": "bottleneck", "paramters": 1000}, "parameters"),
    ("new_connector", {"kind": "avgpool", "sied": 2}, "side"),
    ("new_connector", {"kind": "resampler", "querys": 4}, "queries"),
    ("new_connector", {"kind": "linear", "intt": "llava"}, "init"),
    ("new_connector", {"kind": "linaer"}, "linear"),
    ("new_connector", {"kind": "resamplr"}, "resampler"),
    ("read_projector", {"kind": "mlp2x_gelu", "widht": 8}, "width"),
    ("read_projector", {"kidn": "mlp2x_gelu"}, "kind"),
    ("ask_and_attribute", {"metod": "rollout"}, "method"),
    ("ask_and_attribute", {"temprature": 1.0}, "temperature"),
    ("ask_and_attribute", {"max_new_tokns": 4}, "max_new_tokens"),
    ("attribute", {"method": "occlusion", "blok": 2}, "block"),
    ("load", {"dtpye": "float32"}, "dtype"),
]


@pytest.mark.parametrize(("name", "options", "meant"), PASSED_ON_AND_MISSPELT)
def test_what_is_passed_on_is_found_however_it_is_misspelt(
    calls: dict[str, Asked], name: str, options: Asked, meant: str
) -> None:
    call = {key: value for key, value in calls[name].items() if key not in ("method", "kind", "sinks", *options)}
    assert f"did you mean {meant!r}?" in refusal(getattr(ll, name), **call, **options)


@pytest.fixture(scope="module")
def calls(tiny_random: ll.Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    from tests.support.public_calls import public_calls

    return public_calls(tiny_random, tmp_path_factory.mktemp("calls"))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("rollout", {"sink": "keep"}, "has no option 'sink'; did you mean 'sinks'? Its options are"),
        ("rollout", {"qqq": 1}, "method 'rollout' has no option 'qqq'; its options are"),
        ("occlusion", {"blok": 3}, "did you mean 'block'?"),
        ("rollout", {"metod": "occlusion"}, "did you mean 'method'?"),
        ("rollout", {"traget": "red"}, "did you mean 'target'?"),
    ],
)
def test_an_option_of_a_method_is_found_too(
    tiny_random: ll.Lab, picture: np.ndarray, method: str, options: Asked, words: str
) -> None:
    run = tiny_random.ask(**asked(picture))
    assert words in refusal(ll.attribute, lab=tiny_random, run=run, method=method, **options)


def test_arguments_by_other_names_are_taken_by_what_explains(tiny_random: Any, picture: np.ndarray) -> None:
    functions: list[Any] = [ll.attribute, ll.logit_lens]
    attribute, logit_lens = functions
    run: Run = tiny_random.ask(**asked(picture))
    wanted = attribute(tiny_random, run, method="random", seed=3, target="answer")
    got = attribute(model=tiny_random, run=run, method="random", random_seed=3, targets="answer")
    np.testing.assert_array_equal(got.values, wanted.values)
    assert logit_lens(tiny_random, run, top_k=2).to_dict() == logit_lens(tiny_random, run, top=2).to_dict()


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (0, {}, "Lab.ask needs picture and question; it is called as Lab.ask(picture, question, ...)"),
        (1, {}, "Lab.ask needs question"),
        (1, {"prompt": "What?"}, "Lab.ask needs question"),
        (2, {"picture": 1}, "Lab.ask was given picture twice"),
        (3, {}, "Lab.ask takes picture, question by place and the rest by name, max_new_tokens=..., temperature=..."),
    ],
)
def test_an_argument_that_is_missing_or_too_many_is_one_line(
    tiny_random: Any, picture: np.ndarray, given: int, options: Asked, words: str
) -> None:
    placed = (picture, QUESTION, 5)[:given]
    assert words in refusal(lambda: tiny_random.ask(*placed, **options))


def test_no_name_of_others_is_one_of_ours_where_it_is_answered() -> None:
    """A table's entry that a function has as its own would never be read."""
    assert set(INSTEAD["max_new_tokens"]) & set(inspect.signature(ll.Lab.ask).parameters) == set()
    assert set(INSTEAD["quantization_config"]) & set(inspect.signature(ll.load).parameters) == set()
    assert [name for name, ours in RENAMED.items() if name in ours] == []


def test_names_that_another_judges_pass() -> None:
    assert by_our_names("f", {"a": 1, "zzz": 2}, {"a": "a"}, more=True) == {"a": 1, "zzz": 2}
    with pytest.raises(OptionError, match="f has no option 'zzz'; its options are a"):
        by_our_names("f", {"zzz": 2}, {"a": "a"})


NAMES = ("rollout", "attention", "integrated_gradients", "gradcam", "kernel_shap", "random")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Rollout", "rollout"),
        ("ROLLOUT", "rollout"),
        ("roll-out", "rollout"),
        ("rolout", "rollout"),
        ("GradCAM", "gradcam"),
        ("Grad-CAM", "gradcam"),
        ("grad_cam", "gradcam"),
        ("integrated gradients", "integrated_gradients"),
        ("IntegratedGradients", "integrated_gradients"),
        ("atention", "attention"),
        ("KernelSHAP", "kernel_shap"),
        ("randm", "random"),
        ("lime", None),
        ("", None),
        ("\ud800", None),
    ],
)
def test_a_name_among_several_is_found_however_it_is_spelt(given: str, meant: str | None) -> None:
    assert nearest(given, NAMES) == meant
    with pytest.raises(OptionError, match="no method .*; the methods are rollout, attention") as error:
        known("method", given, NAMES)
    assert ("did you mean" in str(error.value)) == (meant is not None)


def none() -> None: ...
def one(text: str) -> None: ...
def two(token: int, chances: Any) -> None: ...
def any_number(*given: Any) -> None: ...
def one_and_more(text: str, end: str = "") -> None: ...
def only_named(*, text: str) -> None: ...


class Heard:
    def __call__(self, text: str) -> None: ...

    def both(self, token: int, chances: Any) -> None: ...


@pytest.mark.parametrize(
    ("option", "function", "fits"),
    [
        ("on_token", none, False),
        ("on_token", one, True),
        ("on_token", two, False),
        ("on_token", any_number, True),
        ("on_token", one_and_more, True),
        ("on_token", only_named, False),
        ("on_token", print, True),
        ("on_token", [].append, True),
        ("on_token", partial(two, 1), True),
        ("on_token", Heard(), True),
        ("on_token", Heard, False),
        ("on_token", "print", False),
        ("on_step", one, False),
        ("on_step", two, True),
        ("on_step", Heard().both, True),
        ("on_step", one_and_more, True),
        ("on_step", none, False),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_is_asked(
    tiny_random: ll.Lab, picture: np.ndarray, option: str, function: Any, fits: bool
) -> None:
    if fits:
        tiny_random.ask(**asked(picture), **{option: function})
    else:
        wanted = {"on_token": r"\(str\)", "on_step": r"\(int, Tensor\)"}[option]
        with pytest.raises(OptionError, match=f"{option} must be a function that is called with {wanted} or None, got "):
            tiny_random.ask(**asked(picture), **{option: function})
