"""What LLaVA-1.5's authors printed for the twelve benchmarks, and where common harnesses measure something else.

Sources: haotian-liu/LLaVA @ c121f04 ``docs/MODEL_ZOO.md``, equal to tables 3 and 4 of arXiv 2310.03744; POPE's splits and SEED's
parts are in the paper's tables. What differs was read in lmms-eval 0.7.3 (its ``tasks`` folder) and VLMEvalKit @ e8e78f0; numbers
by others: Karamcheti et al. 2024 (prism, table 2), LLaVA-MORE (arXiv 2503.15621, made with lmms-eval), the issues named.
"""

from __future__ import annotations

PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "LLaVA-1.5 7B": {
        "vqav2": {"accuracy": 78.5},
        "gqa": {"accuracy": 62.0},
        "vizwiz": {"accuracy": 50.0},
        "scienceqa": {"accuracy": 66.8},
        "textvqa": {"accuracy": 58.2},
        "pope": {"F1": 85.9, "F1 random": 87.3, "F1 popular": 86.1, "F1 adversarial": 84.2},
        "mme": {"perception": 1510.7},
        "mmbench": {"accuracy": 64.3},
        "mmbench-cn": {"accuracy": 58.3},
        "seed": {"all": 58.6, "image": 66.1, "video": 37.3},
        "llava-wild": {"all": 65.4},
        "mm-vet": {"total": 31.1},
    },
    "LLaVA-1.5 13B": {
        "vqav2": {"accuracy": 80.0},
        "gqa": {"accuracy": 63.3},
        "vizwiz": {"accuracy": 53.6},
        "scienceqa": {"accuracy": 71.6},
        "textvqa": {"accuracy": 61.3},
        "pope": {"F1": 85.9, "F1 random": 87.1, "F1 popular": 86.2, "F1 adversarial": 84.5},
        "mme": {"perception": 1531.3},
        "mmbench": {"accuracy": 67.7},
        "mmbench-cn": {"accuracy": 63.6},
        "seed": {"all": 61.6, "image": 68.2, "video": 42.7},
        "llava-wild": {"all": 72.5},
        "mm-vet": {"total": 36.1},
    },
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
