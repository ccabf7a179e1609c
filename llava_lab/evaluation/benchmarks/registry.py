"""The twelve benchmarks of LLaVA-1.5 by name, and CHAIR on drawn worlds; what was published for them.

    BENCHMARKS["pope"].asks
    PUBLISHED["LLaVA-1.5 7B"]["pope"], DIFFERENCES["pope"]

`PUBLISHED` is what LLaVA-1.5's authors printed, `DIFFERENCES` where common harnesses measure something else.

Sources: haotian-liu/LLaVA @ c121f04 ``docs/MODEL_ZOO.md``, equal to tables 3 and 4 of arXiv 2310.03744; POPE's splits and SEED's
parts are in the paper's tables. What differs was read in lmms-eval 0.7.3 (its ``tasks`` folder) and VLMEvalKit @ e8e78f0; numbers
by others: Karamcheti et al. 2024 (prism, table 2), LLaVA-MORE (arXiv 2503.15621, made with lmms-eval), the issues named.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from llava_lab.evaluation.benchmarks import choice, judged, short, twins
from llava_lab.evaluation.benchmarks.benchmark import Benchmark

LLAVA = "haotian-liu/LLaVA @ c121f04"
LONG = 1024  # new tokens where LLaVA's script allows that many

_ALL = (
    Benchmark(
        "vqav2",
        "VQAv2",
        "a word or phrase; soft accuracy over ten people",
        "v2_OpenEnded_mscoco_*_questions.json, its annotations where they are public, val2014/ or test2015/",
        f"{LLAVA} scripts/v1_5/eval/vqav2.sh",
        short.score_vqav2,
        read=short.read_vqav2,
        twin=twins.vqav2,
        submit=short.submit_vqav2,
        server=True,
    ),
    Benchmark(
        "gqa",
        "GQA",
        "a word or phrase; exact match",
        "testdev_balanced_questions.json, images/",
        f"{LLAVA} scripts/v1_5/eval/gqa.sh",
        short.score_gqa,
        read=short.read_gqa,
        twin=twins.gqa,
        submit=short.submit_gqa,
    ),
    Benchmark(
        "vizwiz",
        "VizWiz",
        "a word or phrase, or Unanswerable; soft accuracy over ten people",
        "val.json with val/, or test.json with test/",
        f"{LLAVA} scripts/v1_5/eval/vizwiz.sh",
        short.score_vizwiz,
        read=short.read_vizwiz,
        twin=twins.vizwiz,
        submit=short.submit_vizwiz,
        server=True,
    ),
    Benchmark(
        "scienceqa",
        "ScienceQA-IMG",
        "a letter of up to five; accuracy on questions with a picture",
        "problems.json, pid_splits.json, images/test/",
        f"{LLAVA} scripts/v1_5/eval/sqa.sh",
        choice.score_scienceqa,
        LONG,
        read=choice.read_scienceqa,
        twin=twins.scienceqa,
    ),
    Benchmark(
        "textvqa",
        "TextVQA",
        "a word or phrase, with OCR tokens in the prompt; soft accuracy over ten people",
        "TextVQA_0.5.1_val.json, llava_textvqa_val_v051_ocr.jsonl or TextVQA_Rosetta_OCR_v0.2_val.json, train_images/",
        f"{LLAVA} scripts/v1_5/eval/textvqa.sh",
        short.score_textvqa,
        read=short.read_textvqa,
    ),
    Benchmark(
        "pope",
        "POPE",
        "is there a thing in the picture; F1, mean over random, popular and adversarial absent things",
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, val2014/",
        f"{LLAVA} llava/eval/eval_pope.py",
        choice.score_pope,
        read=choice.read_pope,
        twin=twins.pope,
    ),
    Benchmark(
        "mme",
        "MME",
        "two questions about each picture, one yes and one no; points for single answers and for both",
        "MME_Benchmark_release_version/ with a folder for each subtask",
        f"{LLAVA} scripts/v1_5/eval/mme.sh and MME's eval_tool/calculation.py",
        choice.score_mme,
        read=choice.read_mme,
        twin=twins.mme,
        submit=choice.submit_mme,
    ),
    Benchmark(
        "mmbench",
        "MMBench",
        "a letter of up to four; right only in every rotation of the options",
        "mmbench_dev_20230712.tsv",
        f"{LLAVA} scripts/v1_5/eval/mmbench.sh",
        choice.score_mmbench,
        LONG,
        read=choice.read_mmbench,
        twin=twins.mmbench,
        submit=choice.submit_mmbench,
        server=True,
    ),
    Benchmark(
        "mmbench-cn",
        "MMBench-CN",
        "the same in Chinese",
        "mmbench_dev_cn_20231003.tsv",
        f"{LLAVA} scripts/v1_5/eval/mmbench_cn.sh",
        choice.score_mmbench,
        LONG,
        read=partial(choice.read_mmbench, chinese=True),
        twin=partial(twins.mmbench, chinese=True),
        submit=choice.submit_mmbench,
        server=True,
    ),
    Benchmark(
        "seed",
        "SEED-Bench",
        "a letter of four and nothing else; accuracy, pictures and the middle frame of videos",
        "SEED-Bench.json, SEED-Bench-image/, SEED-Bench-video-image/ with a frame named by question_id",
        f"{LLAVA} scripts/v1_5/eval/seed.sh",
        choice.score_seed,
        read=choice.read_seed,
        twin=twins.seed,
        submit=choice.submit_seed,
    ),
    Benchmark(
        "llava-wild",
        "LLaVA-Bench (in the wild)",
        "free answers; a judge's scores over those of reference answers",
        "questions.jsonl, context.jsonl, answers_gpt4.jsonl, images/, and LLaVA's rule.json for the judge",
        f"{LLAVA} llava/eval/eval_gpt_review_bench.py",
        judged.score_wild,
        LONG,
        read=judged.read_wild,
        twin=twins.wild,
        grade=judged.grade_wild,
    ),
    Benchmark(
        "mm-vet",
        "MM-Vet",
        "free answers; a judge's grades from 0 to 1",
        "mm-vet.json, images/, and the text of MM-Vet's notebook as prompt.txt for the judge",
        f"{LLAVA} scripts/v1_5/eval/mmvet.sh and MM-Vet's notebook",
        judged.score_vet,
        LONG,
        read=judged.read_vet,
        twin=twins.vet,
        grade=judged.grade_vet,
        submit=judged.submit_vet,
    ),
    Benchmark(
        "chair",
        "CHAIR",
        "a description; how much of what it names is not there (not one of the twelve)",
        "nothing: the truth is exact on drawn worlds alone, so --data picturebook",
        "Rohrbach et al. 2018 (arXiv 1809.02156)",
        twins.score_chair,
        twin=twins.chair,
    ),
)

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({benchmark.name: benchmark for benchmark in _ALL})


# -- what was published ---------------------------------------------------------------------

SIZES = ("LLaVA-1.5 7B", "LLaVA-1.5 13B")
_PRINTED = {  # of each measure, by `SIZES`
    "vqav2": {"accuracy": (78.5, 80.0)},
    "gqa": {"accuracy": (62.0, 63.3)},
    "vizwiz": {"accuracy": (50.0, 53.6)},
    "scienceqa": {"accuracy": (66.8, 71.6)},
    "textvqa": {"accuracy": (58.2, 61.3)},
    "pope": {"F1": (85.9, 85.9), "F1 random": (87.3, 87.1), "F1 popular": (86.1, 86.2), "F1 adversarial": (84.2, 84.5)},
    "mme": {"perception": (1510.7, 1531.3)},
    "mmbench": {"accuracy": (64.3, 67.7)},
    "mmbench-cn": {"accuracy": (58.3, 63.6)},
    "seed": {"all": (58.6, 61.6), "image": (66.1, 68.2), "video": (37.3, 42.7)},
    "llava-wild": {"all": (65.4, 72.5)},
    "mm-vet": {"total": (31.1, 36.1)},
}
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    size: {name: {measure: of[i] for measure, of in numbers.items()} for name, numbers in _PRINTED.items()}
    for i, size in enumerate(SIZES)
}

# What a harness does otherwise, and by how much the 7B's number moves where somebody measured it.
DIFFERENCES: dict[str, tuple[str, ...]] = {
    "vqav2": ("lmms-eval scores val, not test-dev, with 16 new tokens; no number to compare with the paper's.",),
    "gqa": ("lmms-eval's exact match leaves out case and marks; LLaVA-MORE got 62.4 for the 7B with it (paper 62.0).",),
    "vizwiz": (
        "lmms-eval scores val, not test, and capitalises the question; on val others got 54.2 for the 7B (paper, test: 50.0).",
    ),
    "scienceqa": (
        "lmms-eval words it otherwise (no 'Question:', no 'Options:', no N/A) and takes a letter or 'X.' only; LLaVA-MORE got "
        "69.0 for the 7B with it (paper 66.8).",
        "VLMEvalKit has a prompt of its own.",
    ),
    "textvqa": (
        "lmms-eval leaves the OCR tokens out unless told (46.1 instead of 58.2 for the 7B) and capitalises the question; "
        "VLMEvalKit has none (45.5).",
    ),
    "pope": (
        "lmms-eval wants the answer to be yes or no and nothing else, and its yes ratio is the truth's, so always the same; "
        "LLaVA-MORE got 85.6 for the 7B with it (paper 85.9).",
        "VLMEvalKit asks without 'single word or phrase'.",
    ),
    "mme": (
        "VLMEvalKit asks without 'single word or phrase': 1373 instead of 1506 for the 7B (its issue #1029).",
        "LLaVA-MORE got 1474.3 for the 7B with lmms-eval (paper 1510.7); LLaVA's author calls 20 points either way noise (#680).",
    ),
    "mmbench": (
        "lmms-eval joins hint, question and options otherwise and allows 1,024 tokens up to 'ASSISTANT:'; LLaVA-MORE got 65.3 "
        "for the 7B with it (paper 64.3).",
        "VLMEvalKit has a prompt of its own.",
    ),
    "mmbench-cn": (
        "lmms-eval asks for the letter in other words (请直接使用所提供的选项字母作为答案回答。); LLaVA-MORE got "
        "56.5 for the 7B with it (paper 58.3).",
    ),
    "seed": (
        "lmms-eval counts the first sign of the answer, LLaVA the whole of it; LLaVA-MORE got 61.6 (pictures 66.8, videos "
        "42.0) for the 7B with it (paper 58.6, 66.1, 37.3).",
    ),
    "llava-wild": ("The judge was gpt-4-0314. lmms-eval asks gpt-4o-2024-11-20, VLMEvalKit gpt-4-turbo: other scales.",),
    "mm-vet": (
        "Other judges, other scales: LLaVA's released 7B answers, graded again, gave 27.9 instead of 31.1 (LLaVA #1905).",
        "lmms-eval asks the model for step by step reasoning first, and gpt-4o-2024-11-20 to grade.",
    ),
}
