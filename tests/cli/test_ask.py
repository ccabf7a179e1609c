"""ask and explain with stand-ins for everything heavy; lens and knockout on a small random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_lab.cli import main as cli
from llava_lab.cli.ask import read_layers, read_place
from llava_lab.results import Effect, FlowSweep, LogitLens, Relevance, Run
from tests.support.endpoint_server import Answered, a_red_car, says, serving
from tests.support.stand_in import StandIn

Printed = Callable[..., dict[str, Any]]
Refused = Callable[..., str]
QUESTION = "What color is the car?"


def test_ask_json_is_the_promised_object(lab: StandIn, printed: Printed) -> None:
    data = printed("ask", "car.png", QUESTION, "--seed", "7", "--temperature", "0.5", "--fit", "crop")
    assert set(data) == {"answer", "words", "tokens", "logprobs", "segments", "model", "question", "cut", "notes"}
    assert data["words"] == ["The", "car", "is", "red."]
    start, stop = data["segments"]["answer"]
    assert "".join(data["tokens"][start:stop]) == "The car is red."
    assert data["logprobs"] == [-0.5, -0.25, None, 0.0]  # JSON has no infinity
    assert {name: lab.asked[name] for name in ("seed", "temperature", "fit")} == {"seed": 7, "temperature": 0.5, "fit": "crop"}
    assert lab.loaded == {"name": "tiny", "device": None, "dtype": None}


def test_ask_streams_the_answer_for_a_person(lab: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "car.png", QUESTION, "--model", "folder"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "The car is red. "
    assert lab.loaded["name"] == "folder"


def test_explain_json_is_the_promised_object(lab: StandIn, printed: Printed) -> None:
    data = printed("explain", "car.png", QUESTION, "--option", "residual=0.7", "--seed", "5")
    keys = {"answer", "cut", "words", "targets", "grid", "relevance", "method", "options", "seconds", "notes", "picture"}
    keys |= {"noise_floor"}
    assert set(data) == keys
    assert data["targets"] == ["The", "car", "is", "red."]
    assert data["grid"] == [2, 2]
    assert np.asarray(data["relevance"]).tolist() == np.arange(16).reshape(4, 2, 2).tolist()
    assert data["picture"] == {"width": 60, "height": 40, "mode": "pad", "seen_box": [0.0, 0.0, 60.0, 40.0]}
    assert data["notes"] == ["read me"]
    assert lab.attributed == {"method": "rollout", "target": "words", "options": {"residual": 0.7, "seed": 5}}


def test_several_targets_are_passed_on_as_a_list(lab: StandIn) -> None:
    assert cli.main(["explain", "car.png", "what?", "--target", "red", "--target", "#0"]) == 0
    assert lab.attributed["target"] == ["red", 0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "notes.txt", "what?"], "notes.txt"),
        (["ask", "car.png", "..."], "a question needs words"),
        (["explain", "car.png", "what?", "--method", "magic"], "no method 'magic'; the methods are rollout"),
        (["explain", "car.png", "what?", "--option", "residual"], "--option wants NAME=VALUE"),
        (["explain", "car.png", "what?", "--option", "target=red"], "--option wants NAME=VALUE"),
        (["explain", "car.png", "what?", "--option", "residul=1"], "no option 'residul'"),
        (["explain", "car.png", "what?", "--out", "map.bmpx"], "--out must end in one of"),
        (["ask", "car.png", "what?", "--save", "car.png/run.npz"], "cannot write"),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_users_mistake_is_one_line(lab: StandIn, argv: list[str], message: str, extra: list[str], refused: Refused) -> None:
    Path("notes.txt").write_text("not a picture", "utf-8")
    assert message in refused(*argv, *extra)


@pytest.mark.parametrize("argv", [["car.png", "what?", "--option", "residul=1"], ["cat.png", "what?"]])
def test_a_mistyped_option_or_path_is_said_before_a_large_model_is_loaded(lab: StandIn, argv: list[str]) -> None:
    assert cli.main(["explain", *argv]) == 2
    assert lab.loaded == {}


@pytest.mark.parametrize(("target", "panels"), [("red.", 1), ("words", 4)])
def test_out_draws_one_map_or_one_for_each_word(lab: StandIn, here: Path, target: str, panels: int) -> None:
    out = here / "new" / "map.svg"
    assert cli.main(["explain", "car.png", "what?", "--target", target, "--out", str(out)]) == 0
    assert out.read_text("utf-8").count('<g id="axes_') == panels + 1  # and one for the colour bar


@pytest.mark.long
def test_a_gif_moves_from_word_to_word_and_is_whole(lab: StandIn, here: Path) -> None:
    argv = ["explain", "car.png", "what?", "--target", "words", "--out", str(here / "new" / "map.GIF")]
    assert cli.main(argv) == 0
    with Image.open(here / "new" / "map.GIF") as image:
        assert image.format == "GIF"
        assert getattr(image, "n_frames", 1) > 10
    assert cli.main(argv) == 2  # it is there already


def test_saved_results_load_again(lab: StandIn) -> None:
    assert cli.main(["ask", "car.png", "what?", "--save", "run.npz"]) == 0
    assert Run.load("run.npz").answer == "The car is red."
    assert cli.main(["explain", "car.png", "what?", "--save", "map.npz"]) == 0
    assert Relevance.load("map.npz").notes == ("read me",)


# -- a closed model -------------------------------------------------------------------------


@pytest.fixture
def key(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    return "sk-very-secret-0123456789"


def test_a_closed_model_is_asked_and_explained_within_its_budget(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(a_red_car) as server:
        box = ["car.png", QUESTION, "--model", "openai:scripted", "--base-url", server.base_url]
        assert cli.main(["ask", *box]) == 0
        assert capsys.readouterr().out == "a red car\n"
        explain = ["explain", *box, "--method", "occlusion", "--option", "block=6", "--target", "red", "--json"]
        assert cli.main([*explain, "--max-requests", "4"]) == 2
        assert "needs 5 requests and 4 of max_requests=4 are left" in capsys.readouterr().err
        assert cli.main([*explain, "--max-requests", "5", "--price", "1,2"]) == 0
        assert len(server.asked) == 6
    out = capsys.readouterr()
    data = json.loads(out.out)
    assert (data["answer"], data["grid"], data["picture"]["mode"]) == ("a red car", [12, 12], "whole")
    assert "5 requests to send, 0 known already, 5 left" in out.err
    assert key not in out.out + out.err


STEERING = "\x1b[2J\x1b]0;title\x07\x9b31m\x7f\x08\r\u202ered\u2066"


@pytest.mark.parametrize("argv", [["ask"], ["ask", "--json"], ["explain", "--method", "center"], ["ask", "-v"]])
@pytest.mark.parametrize("reply", [
    says(f"a {STEERING} car", own=-0.5), Answered({"error": {"message": STEERING}}, 400), says("", finish=STEERING),
    Answered({}, headers={"Content-Type": "a/\x9b"}), Answered({"error": STEERING}, 429, {"Retry-After": "0"}),
])  # fmt: skip
def test_nothing_a_server_says_steers_the_terminal(
    key: str, capsys: pytest.CaptureFixture[str], argv: list[str], reply: Answered
) -> None:
    with serving(lambda asked: reply) as server:
        code = cli.main([argv[0], "car.png", QUESTION, "--model", "openai:m", "--base-url", server.base_url, *argv[1:]])
    out = capsys.readouterr()
    assert code == (0 if reply.status == 200 and '"a ' in json.dumps(reply.data) else 2)
    assert [letter for letter in out.out + out.err if letter in STEERING and not letter.isalnum() and letter not in "[]; "] == []
    if code == 0 and "--json" in argv:
        assert STEERING in json.loads(out.out)["answer"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("explain", ["--model", "openai:m", "--base-url", "{url}"], "'rollout' looks inside the model"),
        ("ask", ["--model", "openai:m"], "needs base_url"),
        ("ask", ["--base-url", "{url}"], "--base-url belongs to --model openai:NAME"),
        ("ask", ["--model", "openai:m", "--base-url", "{url}", "--fit", "pad"], "--prompt and --fit"),
        ("ask", ["--model", "openai:m", "--base-url", "{url}", "--device", "cpu"], "--device and --dtype"),
        ("ask", ["--model", "openai:m", "--base-url", "{url}", "--price", "3"], "--price wants two numbers"),
        ("lens", ["--model", "openai:m"], "lens looks inside the model"),
    ],
)
def test_mistakes_with_a_closed_model_send_nothing(
    key: str, command: str, options: list[str], message: str, refused: Refused
) -> None:
    with serving(a_red_car) as server:
        assert message in refused(command, "car.png", QUESTION, *(option.format(url=server.base_url) for option in options))
        assert server.asked == []


# -- lens -----------------------------------------------------------------------------------


@pytest.fixture
def lens(here: Path, tiny_folder: Path) -> list[str]:
    return ["lens", "car.png", QUESTION, "--model", str(tiny_folder), "--max-new-tokens", "2"]


def test_lens_json_holds_what_the_lens_finds(lens: list[str], printed: Printed) -> None:
    data = printed(*lens, "--word", "red", "--patch", "1,2", "--top", "3", "--save", "lens.npz")
    saved = LogitLens.load("lens.npz")
    assert [state["state"] for state in data["states"]] == [0, 1, 2, 3]
    assert data["grid"] == [4, 4]
    word = data["words"][0]
    assert word["probability"] == pytest.approx(float(saved.probs.max()))
    assert saved.rank_of("red")[word["state"], word["row"], word["col"]] == word["rank"]
    assert [text for text, _ in data["patch"]["states"][2]["top"]] == [text for text, _ in saved.at(2, 1, 2)]
    assert data["states"][1]["entropy"] == pytest.approx(float(saved.entropy[1].mean()))
    assert set(data["nearest"]) >= {"readable_share", "random_share", "space", "centered"}


def test_lens_gives_a_person_a_table(lens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*lens, "--layers", "1:3", "--word", "red", "--patch", "0,0"]) == 0
    text = capsys.readouterr().out
    for part in ("said by most patches", "'re' alone, a part of 'red': ", "patch row 0, column 0:", "for random vectors"):
        assert part in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers", "two"], "--layers wants a state such as 3, or a window such as 2:5, got 'two'"),
        (["--layers", "9"], "layers must be a state from 0"),
        (["--patch", "1"], "--patch wants a row and a column"),
        (["--patch", "9,0"], "--patch lies in a 4x4 grid"),
        (["--space", "middle"], "--space must be input or output, got 'middle'"),
    ],
)
def test_lens_says_mistakes_in_one_line(lens: list[str], extra: list[str], message: str, refused: Refused) -> None:
    assert message in refused(*lens, *extra, "--json")


# -- knockout -------------------------------------------------------------------------------


@pytest.fixture
def knockout(here: Path, tiny_folder: Path) -> list[str]:
    return ["knockout", "car.png", QUESTION, "--model", str(tiny_folder)]


def test_knockout_json_is_one_object_with_the_effect(knockout: list[str], printed: Printed) -> None:
    argv = ["--source", "0,1;2,3", "--to", "last", "--layers", "0:2", "--draws", "3", "--save", "effect.npz"]
    data = printed(*knockout, *argv)
    assert data["options"] == {"source": "2 patches", "target": "last", "layers": [0, 2], "keep_self": True}
    assert len(data["targets"][0]["control"]) == 3
    assert data["proof"]["largest"] == 0
    assert Effect.load("effect.npz").what == data["what"]


def test_a_sweep_gives_every_flow_and_window(knockout: list[str], printed: Printed) -> None:
    data = printed(*knockout, "--sweep", "--save", "sweep.npz")
    assert data["flows"] == ["image -> question", "question -> last", "image -> last"]
    assert np.array(data["change"]).shape == (3, 3, 1)
    assert FlowSweep.load("sweep.npz").flows == tuple(data["flows"])


def test_knockout_gives_people_a_table(knockout: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*knockout, "--draws", "1"]) == 0
    out = capsys.readouterr().out
    assert "last may not attend to image in layers 0 to 2" in out
    assert "largest weight 0" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers", "3"], "--layers wants START:STOP"),
        (["--sweep", "--source", "question"], "--sweep moves its own window"),
        (["--width", "3"], "--width belongs to --sweep"),
        (["--source", "tail"], "no segment 'tail'"),
        (["--layers", "0:9"], "layers must be"),
    ],
)
def test_knockout_says_mistakes_in_one_line(knockout: list[str], extra: list[str], message: str, refused: Refused) -> None:
    assert message in refused(*knockout, *extra)


def test_places_are_read_as_typed() -> None:
    assert read_place("image") == "image"
    assert read_place("1,2;3,4") == [(1, 2), (3, 4)]
    assert read_layers(None) is None
    assert read_layers("2:5") == (2, 5)
