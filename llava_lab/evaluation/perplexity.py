"""How well a language model still reads plain text: perplexity on prose of our own that no training saw.

perplexity(lab.model, lab.tokenizer)
"""

from __future__ import annotations

import math
from typing import Any

import torch

from llava_lab.checks import one_of
from llava_lab.models import layout, load
from llava_lab.models.formats import photo, smol
from llava_lab.models.load import quiet

# Written for this purpose, about nothing in the picture book.
PROSE = (
    "The ferry leaves the harbour at half past six. On weekday mornings it carries nurses, teachers and a man who sells "
    "newspapers, and everybody knows where everybody sits. When the wind comes from the north the crossing takes ten minutes "
    "longer, and nobody complains, because the captain is said to remember it.",
    "A good soup needs time more than it needs ingredients. Start with onions, cut small, and let them soften without "
    "browning. Add carrots and celery, then water, and wait. Salt should come late, since the liquid shrinks while it cooks. "
    "What is left over on the second day is usually better than what was served on the first.",
    "In the spring of that year the library moved to a new building. The shelves were lower, the windows were larger, and for "
    "the first weeks visitors whispered as if they had come to somebody's house. By the summer they had begun to argue again "
    "about the heating.",
    "To measure how quickly a stone falls, you can drop it from a known height and listen. Sound takes time to return, so the "
    "clock will show a little too much. For a shallow well the error is small; for a deep one it must be taken away before "
    "the depth is computed.",
    "My uncle repaired watches. He kept the smallest screws in a box that had once held peppermints, and he said that the "
    "smell helped him concentrate. People brought him things that no shop would take, and he never promised anything except "
    "that he would look.",
)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: tuple[str, ...] = PROSE) -> float:
    """exp of the mean negative log-likelihood per token, without any picture, each text on its own from its second token."""
    language = layout.language_model(model) if hasattr(model, "model") and hasattr(model.model, "language_model") else model.model
    head, total, count = model.get_output_embeddings(), 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=head.weight.device)
        states = language(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        losses = torch.nn.functional.cross_entropy(head(states).float()[0], ids[0, 1:], reduction="sum")
        total, count = total + float(losses), count + ids.shape[1] - 1
    return math.exp(total / count)


def plain_text_perplexity(name: str = "smol") -> dict[str, float]:
    """Perplexity on plain prose of the language model of "smol" or "photo" as it came and after its training.

    plain_text_perplexity()["after"]  # beside "before"
    """
    with quiet():
        model, processor = {"smol": smol, "photo": photo}[one_of("name", name, ("smol", "photo"))].assemble()
    before = perplexity(model, processor.tokenizer)
    lab = load(name)
    return {"before": round(before, 3), "after": round(perplexity(lab.model, lab.tokenizer), 3)}
