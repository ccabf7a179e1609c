"""How long from a started kernel to the first answer.

The floor is the bare imports nobody can avoid, the peer stock transformers used the usual way. Every measurement is a
process of its own; nothing is warmed up except the disk's cache.
"""

from __future__ import annotations

import logging
from typing import Any

from llava_lab.bench.harness import QUESTION, child, extra_memory, median, row

logger = logging.getLogger(__name__)

NEW_TOKENS = 16
SIDE = 288  # of the square test picture, pixels

FLOOR = "import torch; from transformers import LlavaForConditionalGeneration, LlavaProcessor\nfacts = {}\n"

OURS = """
import numpy as np, llava_lab as ll
from llava_lab.models.folders import find
lab = ll.load(model)
run = lab.ask(np.full((side, side, 3), 128, np.uint8), question, max_new_tokens=new)
facts = {"device": str(lab.device), "answer": run.answer, "logprobs": run.logprobs.tolist()}
facts |= {"prompt": run.prompt, "folder": str(find(model).path)}
"""

PEER = """
import numpy as np, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(model)
network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
inputs = processor(text=prompt, images=np.full((side, side, 3), 128, np.uint8), return_tensors="pt")
out = network.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True)
said = out.sequences[0, inputs["input_ids"].shape[1]:]
answer = processor.decode(said, skip_special_tokens=True).strip()
facts = {"answer": answer, "logprobs": [float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, said)]}
"""


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Seconds to the first answer of `model`, ours and the peer's, over the bare imports."""
    floors, ours, peers = [], [], []
    asked = {"side": SIDE, "question": QUESTION, "new": NEW_TOKENS}
    for number in range(repeats):
        floors.append(child(FLOOR))
        ours.append(child(OURS, model=model, **asked))
        peers.append(child(PEER, model=ours[-1]["folder"], prompt=ours[-1]["prompt"], **asked))
        logger.info("start %d of %d: floor %.2f s, ours %.2f s", number + 1, repeats, floors[-1]["seconds"], ours[-1]["seconds"])
    floor, mine, peer = (median(runs, "seconds") for runs in (floors, ours, peers))
    error = answer_difference(ours[-1], peers[-1])
    return {
        "device": ours[-1]["device"],
        "threads": ours[-1]["threads"],
        "rows": [
            row("bare imports: torch and the llava classes", floor, floor, floor / peer, 0.0, None),
            row("first answer, llava_lab", mine, floor, mine / peer, extra_memory(ours, floors), error),
            row("first answer, transformers' Auto classes and generate", peer, floor, 1.0, extra_memory(peers, floors), 0.0),
        ],
        "floor": floor,
        "peak_flops_fraction": None,
    }


def answer_difference(mine: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    """Largest difference of the answer's log-probabilities; None when the answers differ or are empty."""
    pairs = list(zip(mine["logprobs"], theirs["logprobs"], strict=False))
    if mine["answer"] != theirs["answer"] or not pairs:
        return None
    return max(abs(a - b) for a, b in pairs)
