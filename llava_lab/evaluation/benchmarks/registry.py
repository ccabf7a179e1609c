"""The twelve benchmarks of LLaVA-1.5 by name, and CHAIR on drawn worlds.

BENCHMARKS["pope"].asks
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from llava_lab.evaluation.benchmarks import choice, judged, short, twins, yes_no
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
        yes_no.score_pope,
        read=yes_no.read_pope,
        twin=twins.pope,
    ),
    Benchmark(
        "mme",
        "MME",
        "two questions about each picture, one yes and one no; points for single answers and for both",
        "MME_Benchmark_release_version/ with a folder for each subtask",
        f"{LLAVA} scripts/v1_5/eval/mme.sh and MME's eval_tool/calculation.py",
        yes_no.score_mme,
        read=yes_no.read_mme,
        twin=twins.mme,
        submit=yes_no.submit_mme,
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
