"""Options by name: what other libraries call ours is taken, what they have and we have not is answered, a misspelling is found.

`entry` asks `by_our_names` for every public function, and a method of attribution for its own options.

    by_our_names("Lab.ask", {"max_tokens": 5}, {"max_new_tokens": "max_new_tokens"})  # {"max_new_tokens": 5}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from llava_lab.errors import OptionError

# What others call an argument of ours that means the same: the first of these that a function has.
RENAMED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict"), ("max_new_tokens",)),
        **dict.fromkeys(("image", "images", "img", "pil_image", "image_path", "image_file"), ("picture", "pictures")),
        "picture": ("pictures",),
        "pictures": ("picture",),
        **dict.fromkeys(("text", "query", "instruction"), ("question", "questions")),
        "question": ("questions",),
        "questions": ("question",),
        **dict.fromkeys(("chat_history", "conversation"), ("history",)),
        **dict.fromkeys(("model_name", "model_id", "model_path", "pretrained_model_name_or_path"), ("name", "model")),
        "model": ("lab", "name"),
        "lab": ("model",),
        "torch_dtype": ("dtype",),
        "attn_implementation": ("attention",),
        "model_base": ("base",),
        "vision_tower": ("vision",),
        **dict.fromkeys(("random_seed", "random_state"), ("seed",)),
        "batch_size": ("batch",),
        **dict.fromkeys(("verbose", "show_progress"), ("progress",)),
        **dict.fromkeys(("attribution", "relevance", "saliency"), ("rel",)),
        **dict.fromkeys(("top_k", "topk", "k"), ("top",)),
        **dict.fromkeys(("n_steps", "num_steps", "max_steps"), ("steps",)),
        **dict.fromkeys(("lr", "learning_rate"), ("rate",)),
        "word": ("target",),
        "targets": ("target",),
        **dict.fromkeys(("output_dir", "out_dir"), ("out", "folder")),
        "callback": ("on_token",),
    }
)

_DRAWN = "a word is drawn from all of the model's probabilities, which run.logprobs holds; temperature=... sharpens them"
_BEAMS = "an answer is made token by token, without beams"
_AS_THEY_ARE = "the model's probabilities are read as they are, none is raised or lowered"
_ENDS = "an answer ends where the model ends it, at the latest after max_new_tokens=..."
_ONE = "a call gives one answer; ask again with another seed=..., or several questions with lab.ask_many"
_TOLD = "every run has them: run.logprobs and run.token_ids; on_step=... is given those of all tokens"
_FORM = "prompt=... names the form of the prompt: 'llava-1.5', 'hf' or 'chat'"
_PLAIN = "an answer is text; give the question in words"
_LOADED = "it is said once, when the model is loaded: ll.load"
_LOGIN = (
    "set the environment variable HF_TOKEN, or log in with `hf auth login`; the key of a server is read from key_variable=..."
)
_READ = {
    "output_attentions": "attention is read while it is needed: ll.head_maps, ll.attribute(method='attention')",
    "output_hidden_states": "hidden states are read while they are needed: ll.logit_lens, llava_lab.capture",
}
_ASKING = {
    "do_sample": "temperature=... above 0 draws the answer's words, 0 takes the likeliest",
    "max_length": "max_new_tokens=... counts the tokens of the answer alone",
    **dict.fromkeys(("top_p", "top_k", "min_p", "typical_p", "sampling"), _DRAWN),
    **dict.fromkeys(("num_beams", "num_beam_groups", "length_penalty", "early_stopping", "best_of", "penalty_alpha"), _BEAMS),
    **dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty", "no_repeat_ngram_size"), _AS_THEY_ARE),
    **dict.fromkeys(("logit_bias", "bad_words_ids", "suppress_tokens", "logits_processor"), _AS_THEY_ARE),
    **dict.fromkeys(("stop", "stop_strings", "stop_sequences", "stopping_criteria", "eos_token_id", "pad_token_id"), _ENDS),
    **dict.fromkeys(("min_length", "min_new_tokens", "min_tokens"), _ENDS),
    **dict.fromkeys(("n", "num_return_sequences"), _ONE),
    **dict.fromkeys(("stream", "streamer"), "give on_token=..., a function that is called with the answer's text as it grows"),
    **dict.fromkeys(("logprobs", "top_logprobs", "output_scores", "output_logits", "return_dict_in_generate"), _TOLD),
    "messages": "give the last question as question=..., and the turns before it as history=...",
    **dict.fromkeys(("system", "system_prompt"), f"{_FORM}, and the system text is part of it; a server's is given to ll.load"),
    **dict.fromkeys(("conv_mode", "chat_template", "add_generation_prompt"), _FORM),
    **dict.fromkeys(("response_format", "tools", "tool_choice"), _PLAIN),
    **dict.fromkeys(("device", "dtype", "torch_dtype", "timeout"), _LOADED),
    "use_cache": "what was read once is always kept while an answer is made",
    "generation_config": "give max_new_tokens=..., temperature=... and seed=... themselves",
    **_READ,
}
_LOADING = {
    "trust_remote_code": "nothing that comes with a checkpoint is run",
    "use_flash_attention_2": "use attention='flash_attention_2'",
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    **dict.fromkeys(("token", "use_auth_token", "api_key"), _LOGIN),
    "low_cpu_mem_usage": "weights are never held twice",
    "use_safetensors": "safetensors are read where there are any",
    "use_fast": "tokenizers are the fast ones, pictures are prepared as LLaVA did",
    "max_memory": "give device_map as a dictionary",
    "offload_folder": "give a smaller dtype, or device_map",
    "subfolder": "give the folder itself",
    "conv_mode": "use prompt= when you ask",
    **_READ,
}
# What others have and we have not, and what to do instead; for the functions that have the argument named first.
INSTEAD: Mapping[str, Mapping[str, str]] = MappingProxyType({"max_new_tokens": _ASKING, "quantization_config": _LOADING})
# With these values it asks for what is done anyway, as with None, False, 0 and nothing at all, and is left out.
NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("num_beams", "num_beam_groups", "best_of", "n", "num_return_sequences"), 1),
        **dict.fromkeys(("top_p", "typical_p", "repetition_penalty", "length_penalty"), 1),
        **dict.fromkeys(("use_cache", "add_generation_prompt"), True),
    }
)
UNLESS: Mapping[str, str] = MappingProxyType({"do_sample": "temperature"})  # it contradicts this one, where that is given


def by_our_names(
    who: str,
    given: Mapping[str, Any],
    ours: Mapping[str, str],
    *,
    before: Collection[str] = (),
    beside: Collection[str] = (),
    more: bool = False,
) -> dict[str, Any]:
    """The options `given` to `who`, by our names alone. Raises OptionError, one line, for one that is none of ours.

    `ours`: every name and how a list of them shows it. `before`: those whose value was given by place. `beside`: further names
    that may have been misspelt. `more`: whether names that are not known here are somebody else's to judge.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        same = next((own for own in RENAMED.get(name, ()) if own in ours), None)
        reason = instead_of(name, ours)
        if name in ours or (same is None and reason is None and more):
            found[name] = value
        elif same is not None:
            twice = same in before or same in given or same in found
            if twice and value is not None:
                raise OptionError(f"{name} and {same} say the same; use {same}=... alone")
            if not twice:
                found[same] = value
        elif reason is None:
            raise OptionError(f"{who} has no option {name!r}{_hint(name, ours, beside)}")
        elif not _asks_for_nothing(name, value) or given.get(UNLESS.get(name, "")):
            raise OptionError(f"{who} has no {name}: {reason}; leave it out")
    return found


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that others call so, or that is most like it; None where there is none."""
    if same := [own for own in RENAMED.get(name, ()) if own in names]:
        return same[0]
    spelt = {_letters(own): own for own in names}
    near = difflib.get_close_matches(_letters(name), spelt, 1)
    return spelt[near[0]] if near else None


def instead_of(name: str, ours: Collection[str]) -> str | None:
    """What to do instead of an option that others have and functions like the one with `ours` have not."""
    return next((reasons[name] for kind, reasons in INSTEAD.items() if kind in ours and name in reasons), None)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def _hint(name: str, ours: Mapping[str, str], beside: Collection[str]) -> str:
    near, listed = nearest(name, [*ours, *beside]), ", ".join(ours.values()) or "none"
    return f"; did you mean {near!r}? Its options are {listed}" if near else f"; its options are {listed}"


def _asks_for_nothing(name: str, value: Any) -> bool:
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))
    return plain and (not value or (name in NEUTRAL and value == NEUTRAL[name]))
