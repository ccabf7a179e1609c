"""Tokenizer, image processor and chat template of an original LLaVA folder.

An original vocabulary has no ``<image>``: it stands outside the vocabulary there. As the official conversion does,
``<image>`` and then ``<pad>`` are added as special tokens after the last word. Nothing that comes with the folder is run.

Sources: transformers ``convert_llava_weights_to_hf.py``; haotian-liu/LLaVA @ c121f04 ``llava/conversation.py``
(vicuna_v1), ``llava/mm_utils.py`` (expand2square).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, CLIPVisionConfig, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from llava_lab.errors import CheckpointError
from llava_lab.models import folders
from llava_lab.models.prompts import CUE, END_OF_TURN, IMAGE, SYSTEM

PAD, PATCH = "<pad>", "<im_patch>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TEMPLATE = (
    SYSTEM + " {% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE + "\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% else %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}" + END_OF_TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + CUE + "{% endif %}"
)


def read_tokenizer(folder: Path, *, patch_token: bool, marks: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with what its config asks for, ``<image>`` and ``<pad>`` added. Raises CheckpointError."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{folder} has no tokenizer; expected tokenizer.model or tokenizer.json")
    if not (folder / "tokenizer.json").is_file() and not (is_sentencepiece_available() and is_protobuf_available()):
        raise CheckpointError(
            f"{folder} has its words in tokenizer.model only, which needs two packages to be read; "
            "`pip install sentencepiece protobuf`, or put the tokenizer.json of the same Vicuna beside it"
        )
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            from transformers import LlamaTokenizer

            tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
        if patch_token:
            tokenizer.add_tokens([PATCH], special_tokens=True)
        tokenizer.add_tokens(list(marks), special_tokens=True)
        tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": PAD})
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({said})") from None
    return tokenizer


def image_processor(tower: Path | None, vision: CLIPVisionConfig, *, pad: bool) -> LlavaImageProcessorPil:
    """CLIP's own transform, from the tower's folder or openai's settings, behind LLaVA's square of the mean colour."""
    given: dict[str, Any] = {}
    if tower is not None and (tower / "preprocessor_config.json").is_file():
        given = folders.read_json(tower / "preprocessor_config.json")
    side = vision.image_size
    size, crop = given.get("size", side), given.get("crop_size", side)
    return LlavaImageProcessorPil(
        do_pad=pad,
        size={"shortest_edge": size} if isinstance(size, int) else size,
        crop_size={"height": crop, "width": crop} if isinstance(crop, int) else crop,
        image_mean=list(given.get("image_mean", CLIP_MEAN)),
        image_std=list(given.get("image_std", CLIP_STD)),
        resample=given.get("resample", 3),
    )
