"""Plain texts the untouched language model wrote: read again in stage 2, they keep its ability with text.

No foreign text is needed: what a model says when it is sampled is drawn from exactly the distribution that must stay.

    own_texts(model, tokenizer, Path("runs/smol/texts.json"))  # lists of token ids
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_lab.errors import one_line
from llava_lab.results.save import whole_file

log = logging.getLogger(__name__)

ASKED = (
    *("What is the capital of Italy?", "Write two sentences about the sea.", "How do I boil an egg?", "Tell me a short joke."),
    *("What is photosynthesis?", "Give me three tips for sleeping well.", "Who wrote Hamlet?", "Explain gravity to a child."),
    *("Write a short poem about winter.", "What is 7 plus 5?", "How does a bicycle stay upright?", "Name four animals that fly."),
    *("What is a good breakfast?", "Translate 'good morning' into French.", "Why is the sky blue?", "Describe a busy market."),
    *("What does a doctor do?", "Write a polite email asking for a day off.", "How do plants drink?", "What is a computer?"),
    *("Tell me about the Moon.", "What are the seasons?", "How can I learn a new language?", "Give me a riddle."),
)
CHATS = tuple(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n" for asked in ASKED)
OPENED = (
    *("The old man walked", "In the nineteenth century,", "To make bread, you", "The committee decided that"),
    *("She opened the letter and", "Scientists have found that", "When the rain stopped,", "A good teacher", "The city lies on"),
    *("My grandmother always said that", "The train was late, so", "In mathematics, a function", "Many people believe that"),
    *("The first thing to do is", "At night the forest", "Water freezes when", "The museum opened in", "He had never seen"),
    *("Children learn best when", "The price of coffee", "If you want to travel,", "The engine of a car"),
    *("Once there was a king who", "It is often said that"),
)
EACH, LENGTH, HEAT = 4, 64, 0.9
BEGUN = (  # single words, so that what follows is as varied as the model is
    *("The", "A", "In", "I", "When", "It", "We", "He", "She", "They", "My", "This", "There", "On", "After", "Before"),
    *("If", "As", "For", "At", "You", "What", "How", "Why", "One", "Two", "Some", "Most", "Every", "From", "By", "During"),
    *("Although", "While", "Once", "Our", "People", "Today", "Since", "Under", "Because", "Her", "His", "Each", "Then"),
    *("Yesterday", "Without", "Over"),
)
AGAIN, WARM, AT_ONCE = 12, 1.0, 264  # texts to each beginning for the last stage, their temperature, rows sampled together


def own_texts(model: Any, tokenizer: Any, file: Path, *, each: int = EACH, length: int = LENGTH) -> list[list[int]]:
    """Token ids of texts sampled from the language model as it is, kept in `file` so that a resumed run reads the same."""
    groups = [[text for text in texts for _ in range(each)] for texts in (CHATS, OPENED)]
    return _sampled(model, tokenizer, file, list(enumerate(groups)), length=length, heat=HEAT)


def many_texts(model: Any, tokenizer: Any, file: Path, *, again: int = AGAIN, length: int = LENGTH) -> list[list[int]]:
    """More of them, from more beginnings and at the model's own temperature, for a stage that reads them half of the time."""
    prompts = [text for text in (*CHATS, *OPENED, *BEGUN) for _ in range(again)]
    groups = [(100 + n, prompts[first : first + AT_ONCE]) for n, first in enumerate(range(0, len(prompts), AT_ONCE))]
    return _sampled(model, tokenizer, file, groups, length=length, heat=WARM)


def _sampled(
    model: Any, tokenizer: Any, file: Path, groups: Sequence[tuple[int, list[str]]], *, length: int, heat: float
) -> list[list[int]]:
    """Continuations of each group's prompts with its seed, from `file` where they are there."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s is damaged and is written anew (%s)", file, one_line(error))
    log.info("the language model writes %d texts of its own", sum(len(prompts) for _, prompts in groups))
    texts: list[list[int]] = []
    for seed, prompts in groups:
        ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        texts += sample(model, ids, length=length, end=tokenizer.eos_token_id, seed=seed, heat=heat)
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(texts))
    return texts


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], *, length: int, end: int, seed: int, heat: float = HEAT) -> list[list[int]]:
    """Continue prompts by sampling, all at a time; an end mark is kept and nothing comes after it."""
    random = torch.Generator().manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    image_id, language, head = model.config.image_token_index, model.model.language_model, model.get_output_embeddings()
    texts: list[list[int]] = [list(row) for row in prompts]
    open_rows, cache = set(range(len(prompts))), None
    for _ in range(length):
        place = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = language(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = head(out.last_hidden_state[:, -1]).float()
        logits[:, image_id] = -torch.inf
        ids = torch.multinomial((logits / heat).softmax(-1), 1, generator=random)
        for row in list(open_rows):
            texts[row].append(int(ids[row]))
            if texts[row][-1] == end:
                open_rows.remove(row)
        if not open_rows:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return texts
