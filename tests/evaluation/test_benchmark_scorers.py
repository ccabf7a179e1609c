"""Scorers of the twelve benchmarks on literal cases; each right value is worked out by hand from the published formula."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from llava_lab.evaluation.benchmarks import choice, judged, short, twins
from llava_lab.evaluation.benchmarks.benchmark import MC, SW, Question, interval, question, resampled, values_of
from llava_lab.evaluation.benchmarks.run import tabulate

DRAW = partial(np.zeros, (4, 4, 3), np.uint8)


def ask(key: str, *accepted: str, picture: str | None = None, **more) -> Question:
    return question(key, picture or key, DRAW, "?", accepted, **more)


def value(measures, name: str, pictures: int) -> float:
    return dict(zip([one.name for one in measures], values_of(measures, pictures), strict=True))[name]


# -- short answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "processed"),
    [
        ("Yes.", "yes"),
        ("The red car", "red car"),
        ("two", "2"),
        ("None", "0"),  # the table's own choice
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the table's slip
        ("it's", "it 's"),
        ("3.5", "3.5"),  # a digit after the stop keeps it
        ("no.5", "no.5"),  # and so does this one: the look-behind for a digit never holds
        ("5. floor", "5 floor"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),  # no space beside the mark: it becomes one
        ("red / blue", "red blue"),  # a space beside it: it vanishes
        ("left-hand side", "left hand side"),
        ("what?\nfish", "what fish"),
        ("." * 33 + "a", ".a"),  # 32 stops go, one stays, and "a" is no article where it sticks to it
    ],
)
def test_the_vqa_processor_with_its_slips(answer: str, processed: str) -> None:
    assert short.normalise(answer) == processed


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_leaves_one_person_out(agree: int, score: float) -> None:
    """Of one: he himself left out 0, each of nine others left out 1/3: 9 * (1/3) / 10 = 0.3. Of three: (3 * 2/3 + 7) / 10."""
    assert short.soft("red", ["red"] * agree + ["blue"] * (10 - agree)) == pytest.approx(score)


def test_vqav2_normalises_people_only_where_they_differ() -> None:
    alike, differing = ["A cat."] * 10, ["A cat."] * 9 + ["dog"]
    assert short.soft_challenge("a cat", alike) == 0.0  # "cat" is sent, and ten identical answers stay "A cat."
    assert short.soft_challenge("a cat", differing) == 1.0  # ".lower()" and the article go on both sides
    assert short.soft_textvqa("a cat", alike) == 1.0  # LLaVA's TextVQA evaluator always does


def test_vqav2_by_kind() -> None:
    asked = [ask("1", *["yes"] * 10, kind="yes/no"), ask("2", *["2"] * 10, kind="number")]
    asked.append(ask("3", *["red"] * 7, *["pink"] * 3, kind="other"))
    measures = short.score_vqav2(asked, ["Yes", "three", "pink"])
    assert value(measures, "accuracy", 3) == pytest.approx(100 * (1 + 0 + 0.9) / 3)
    assert [value(measures, kind, 3) for kind in ("yes/no", "number", "other")] == pytest.approx([100, 0, 90])


def test_gqa_is_exact_but_for_case_and_a_full_stop() -> None:
    asked = [ask(str(i), "red", kind="open") for i in range(4)] + [ask("4", "yes", kind="binary")]
    measures = short.score_gqa(asked, ["Red.", "red", "dark red", "a red", "yes"])
    assert value(measures, "accuracy", 5) == pytest.approx(60)
    assert value(measures, "open", 5) == pytest.approx(50)
    assert value(measures, "binary", 5) == pytest.approx(100)


def test_vizwiz_takes_unanswerable_as_an_answer() -> None:
    asked = [ask("1", *["unanswerable"] * 8, "red", "pink", kind="unanswerable"), ask("2", *["cup"] * 10, kind="answerable")]
    measures = short.score_vizwiz(asked, ["Unanswerable", "Unanswerable"])
    assert [value(measures, name, 2) for name in ("accuracy", "answerable", "unanswerable")] == [50, 0, 100]


# -- yes or no ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not", "no"),
        ("Yes. No.", "yes"),  # the first sentence alone
        ("NO", "yes"),  # three spellings count, this is none of them
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_an_answer_as_its_script(answer: str, read: str) -> None:
    assert choice.parse_pope(answer) == read


def test_pope_counts_by_hand() -> None:
    """Random: 3 right yes, 1 missed, 2 said in vain, 2 right no: P 3/5, R 3/4, F1 2/3, yes ratio 5/8. Popular: all right."""
    truth = ["yes"] * 4 + ["no"] * 4
    said = ["Yes"] * 3 + ["No"] + ["Yes"] * 2 + ["No"] * 2
    asked = [ask(f"r{i}", label, kind="random") for i, label in enumerate(truth)]
    asked += [ask(f"p{i}", label, kind="popular") for i, label in enumerate(truth)]
    measures = choice.score_pope(asked, said + [label.capitalize() for label in truth])
    names = ("F1 random", "accuracy random", "precision random", "recall random", "yes ratio random")
    assert [value(measures, name, 16) for name in names] == pytest.approx([200 / 3, 62.5, 60, 75, 62.5])
    assert value(measures, "F1", 16) == pytest.approx((200 / 3 + 100) / 2)
    assert not any("adversarial" in one.name for one in measures)


def test_pope_that_never_says_yes_has_no_precision_and_no_crash() -> None:
    asked = [ask("1", "yes", kind="random"), ask("2", "no", kind="random")]
    measures = choice.score_pope(asked, ["No", "No"])
    assert value(measures, "F1 random", 2) == 0
    assert np.isnan(value(measures, "precision random", 2))


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes", "yes"), ("no.", "no"), (" yes", "yes"), ("Not", "no"), ("It is no", "other"), ("", "other"), ("The yes", "other")],
)
def test_mme_looks_at_four_characters(answer: str, read: str) -> None:
    assert choice.parse_mme(answer) == read


def test_mme_adds_single_answers_and_pairs() -> None:
    """existence: 3 of 4 right, 1 of 2 pairs: 75 + 50. OCR: 1 of 2, no pair: 50. code_reasoning: both: 200."""
    said = {"existence": ("yes", "no", "yes", "yes"), "OCR": ("yes", "maybe"), "code_reasoning": ("Yes", "No")}
    asked, answers = [], []
    for subtask, given in said.items():
        for i, answer in enumerate(given):
            name = f"{subtask}/{i // 2}"
            asked.append(ask(f"{name}#{i % 2}", ("yes", "no")[i % 2], picture=name, kind=subtask, group=name))
            answers.append(answer)
    measures = choice.score_mme(asked, answers)
    assert value(measures, "existence", 4) == pytest.approx(125)
    assert value(measures, "perception", 4) == pytest.approx(175)
    assert value(measures, "cognition", 4) == pytest.approx(200)
    assert {one.name: one.count for one in measures} == {
        "perception": 6, "cognition": 2, "existence": 4, "OCR": 2, "code_reasoning": 2
    }  # fmt: skip


# -- multiple choice ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. blue", "B"),
        ("The answer is B.", "B"),
        ("I think. The answer is C, surely", "C"),  # any sign stands for the full stop
        ("The answer is B", "FAILED"),  # but there must be one
        ("The answer is A. The answer is B.", "FAILED"),
        ("D", "FAILED"),  # three choices have no D
        ("b", "FAILED"),
        ("B.blue", "FAILED"),
        ("", "FAILED"),
    ],
)
def test_scienceqa_reads_three_forms(answer: str, letter: str) -> None:
    assert choice.parse_scienceqa(answer, 3) == letter


def test_scienceqa_asks_as_llava() -> None:
    text = choice.scienceqa_prompt("Which  is red?", ["the cup", "the car"])
    assert text == f"Context: N/A\nQuestion: Which is red?\nOptions: (A) the cup (B) the car\n{MC}"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. blue", "B"),
        ("(B)", "B"),
        ("The right one is B", "B"),
        ("It is a blue car", "B"),  # by its text
        ("A", "A"),
        ("A red thing, I would say", "A"),  # an article says nothing, but the option's text stands there
        ("A large thing, I would say", ""),
        ("A or B", ""),
        ("red or blue", ""),
        ("E", ""),
    ],
)
def test_mmbench_reads_a_letter_or_an_option(answer: str, letter: str) -> None:
    assert choice.parse_mmbench(answer, ("red", "blue", "green", "pink")) == letter


def test_mmbench_counts_a_question_that_is_right_in_every_rotation() -> None:
    """Two questions in two rotations each; one is right in both, one in one: 50% circular, 75% by rows."""
    options = ("red", "blue")
    asked = [ask(str(i), letter, group=group, options=options) for i, letter, group in
             ((1, "A", "1"), (1000001, "B", "1"), (2, "B", "2"), (1000002, "A", "2"))]  # fmt: skip
    measures = choice.score_mmbench(asked, ["A", "B", "B", "B"])
    assert value(measures, "accuracy", 4) == pytest.approx(50)
    assert value(measures, "rows alone", 4) == pytest.approx(75)
    assert measures[0].count == 2


def test_mmbench_asks_as_llava_in_both_languages() -> None:
    assert choice.mmbench_prompt("Hint.\nWhich?", ["red", "blue"]) == f"Hint.\nWhich?\nA. red\nB. blue\n{MC}"
    assert choice.mmbench_prompt("哪个?", ["红"], chinese=True) == "哪个?\nA. 红\n请直接回答选项字母。"


def test_seed_wants_the_letter_and_nothing_else() -> None:
    asked = [ask(str(i), "A", kind=kind, group="Scene") for i, kind in enumerate(("image", "image", "video", "video"))]
    measures = choice.score_seed(asked, ["A", "A.", "A", "A"])
    assert [value(measures, name, 4) for name in ("all", "image", "video", "Scene")] == pytest.approx([75, 50, 100, 75])


# -- judged ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 7\nBecause", (8, 7)),
        ("8,7", (8, 7)),
        ("8.5 6", (8.5, 6)),
        ("8, 7", (-1, -1)),  # the comma becomes a second space
        ("Assistant 1: 8", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_a_review_is_read_as_llava_reads_it(review: str, scores: tuple[float, float]) -> None:
    assert judged.parse_review(review) == scores


def test_llava_wild_divides_means_and_not_single_scores() -> None:
    """Reference 8 and 4, model 4 and 4: 100 * 4 / 6, while the mean of the ratios would be 75."""
    asked = [ask("1", "x", kind="conv"), ask("2", "x", kind="detail")]
    measures = judged.score_wild(asked, [(8, 4), (4, 4)])
    assert value(measures, "all", 2) == pytest.approx(100 * 4 / 6)
    assert [value(measures, name, 2) for name in ("conv", "detail")] == pytest.approx([50, 100])


def test_llava_wild_asks_the_judge_with_the_reference_first() -> None:
    seen = []
    judge = judged.Judge("j", lambda *given: seen.append(given) or "10 5")
    one = ask("1", "a red car", extra={"context": "A car stands there.", "task": "Score them."})
    assert judged.grade_wild(judge, one, "a cup") == (10, 5)
    assert seen[0][1:] == (
        "[Context]\nA car stands there.\n\n[Question]\n?\n\n[Assistant 1]\na red car\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\na cup\n\n[End of Assistant 2]\n\n[System]\nScore them.\n\n", 0.2, 1024
    )  # fmt: skip


def test_mm_vet_asks_again_where_no_grade_was_given() -> None:
    replies, seen = iter(["I would say", "1.7", "0.4 or so"]), []
    judge = judged.Judge("j", lambda *given: seen.append(given) or next(replies))
    one = ask("v1_0", "a<AND>b", extra={"task": "Grade.", "skills": ["rec"]})
    assert judged.grade_vet(judge, one, "it is a") == (0.4, 1.0)
    assert seen[0][1] == "Grade.\n? | a <AND> b | it is a | "
    assert [given[2] for given in seen] == [0.0, 0.5, 1.0]
    assert judged.grade_vet(judged.Judge("j", lambda *given: "?"), one, "x") == (0.0, 0.0)


def test_mm_vet_means_by_skill() -> None:
    asked = [ask("1", "x", extra={"skills": ["rec", "ocr"]}), ask("2", "x", extra={"skills": ["rec"]})]
    measures = judged.score_vet(asked, [(0.5, 1.0), (1.0, 1.0)])
    assert [value(measures, name, 2) for name in ("total", "rec", "ocr")] == pytest.approx([75, 75, 50])


def test_the_rule_judge_grades_and_compares_words() -> None:
    rule = judged.by_rule()
    vet = ask("1", "red car<AND>blue cup", extra={"task": judged.VET_TASK, "skills": ["rec"]})
    assert judged.grade_vet(rule, vet, "There is a red car.")[0] == 0.5
    either = ask("1", "stop<OR>halt", extra={"task": judged.VET_TASK, "skills": ["ocr"]})
    assert judged.grade_vet(rule, either, "It says halt.")[0] == 1.0
    wild = ask("1", "A red car.", kind="conv", extra={"context": "A red car.", "task": "t"})
    assert judged.grade_wild(rule, wild, "A blue cup.") == (10.0, 1.0)


# -- CHAIR ----------------------------------------------------------------------------------


def test_chair_counts_what_is_named_in_vain() -> None:
    """Scene one: a red car, a blue cup; said: red car, green cup, moon. Two: a pink heart; said so."""
    asked = [ask("1", "red car", "blue cup"), ask("2", "pink heart")]
    measures = twins.score_chair(asked, ["A red car, a green cup and a large yellow moon.", "A small pink heart."])
    assert value(measures, "CHAIRi kinds", 2) == pytest.approx(100 / 4)
    assert value(measures, "CHAIRs kinds", 2) == pytest.approx(50)
    assert value(measures, "recall kinds", 2) == pytest.approx(100)
    assert value(measures, "CHAIRi things", 2) == pytest.approx(200 / 4)
    assert value(measures, "recall things", 2) == pytest.approx(200 / 3)


def test_pope_on_drawn_scenes_samples_as_pope_does() -> None:
    asked = twins.pope("test", 12, 0)
    alone, together = twins.frequencies()
    for name in choice.SPLITS:
        rows = [one for one in asked if one.kind == name]
        assert [one.accepted[0] for one in rows].count("yes") * 2 == len(rows)
    questions = {
        name: [one.item.question for one in asked if one.kind == name and one.accepted == ("yes",)] for name in choice.SPLITS
    }
    assert questions["random"] == questions["popular"] == questions["adversarial"]

    def mean(name: str, counts) -> float:
        texts = [one.item.question for one in asked if one.kind == name and one.accepted == ("no",)]
        return float(np.mean([counts[tuple(text.split("?")[0].split()[-2:])] for text in texts]))

    assert mean("popular", alone) > mean("random", alone)
    beside = {thing: max(count for (one, _), count in together.items() if one == thing) for thing in alone}
    assert mean("adversarial", beside) > mean("random", beside)
    assert asked[0].item.question.endswith(SW)


def test_people_on_drawn_scenes_say_numbers_as_digits() -> None:
    """As VQAv2's annotations do: ten equal answers are not normalised any more, so "three" would never be right."""
    numbers = [one for one in twins.vqav2("test", 200, 0) if one.kind == "number"]
    assert numbers
    for one, plain in zip(twins.vqav2("test", 200, 0), twins.gqa("test", 200, 0), strict=True):
        assert short.soft_challenge(plain.accepted[0], one.accepted) == 1.0


# -- measures and intervals -----------------------------------------------------------------


def test_intervals_resample_pictures_and_gaps_are_paired() -> None:
    """Forty pictures of four questions that are right together; the control is wrong exactly where the model is, and on more."""
    right = np.repeat(np.random.default_rng(0).random(40) < 0.7, 4)
    worse = right & np.repeat(np.arange(40) % 4 > 0, 4)
    asked = [ask(f"{i}", "A", picture=f"p{i // 4}", kind="image", group="all of it") for i in range(160)]
    sides = [choice.score_seed(asked, np.where(side, "A", "B").tolist()) for side in (right, worse)]
    scores = tabulate("seed", sides, ("worse",), 40, seed=0, published={}, model="m", fingerprint="f")
    low, high = scores.at("all")["interval"]
    assert 20 < high - low < 40  # of 160 free answers it would be about 14
    gap = scores.at("all", "worse")["gap_interval"]
    assert gap[0] > 0  # paired, the worse is worse beyond doubt,
    assert scores.at("all", "worse")["interval"][1] > low  # though the two intervals overlap
    assert json.dumps(scores.to_dict(), allow_nan=False)


def test_all_right_has_wilsons_interval() -> None:
    asked = [ask(f"{i}", "A", kind="image", group="g") for i in range(10)]
    (measure, *_) = choice.score_seed(asked, ["A"] * 10)
    draws = resampled([[measure]], 10, seed=0)
    assert interval(draws[0, :, 0], measure, 100.0) == pytest.approx([72.2, 100], abs=0.1)
