"""A checkpoint's processor from its parts, without the Auto classes: tokenizer, image processor, chat template.

Nothing that comes with a checkpoint is executed. Image processors are taken in their Pillow form, which is what LLaVA used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llava_lab.errors import CheckpointError, one_line
from llava_lab.models import folders, layout
from llava_lab.models.families import Family

CLIP_PROCESSORS, LLAVA_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor"), ("LlavaImageProcessor",)


def build_processor(folder: Path, model: PreTrainedModel, family: Family) -> Any:
    """The family's processor from its parts: tokenizer.json, the PIL image processor, the chat template."""
    config: Any = model.config
    return family.processor_class()(
        image_processor(folder),
        _tokenizer(folder),
        patch_size=layout.processor_patch(model),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(layout.has_class_token(model)),
        chat_template=_chat_template(folder),
    )


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer  # only a folder without tokenizer.json needs conversion

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({one_line(error)})") from None


def image_processor(folder: Path) -> Any:
    """The checkpoint's image processor in its Pillow form, which is what LLaVA itself used."""
    old = folder / "preprocessor_config.json"
    settings = folders.read_json(old) if old.is_file() else {}
    new = folder / "processor_config.json"
    if not settings and new.is_file():
        settings = folders.read_json(new).get("image_processor", {})
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Pil").removesuffix("Fast")
    if not settings:
        raise CheckpointError(f"{folder} has no image processor settings; expected preprocessor_config.json")
    if kind == "LlavaNextImageProcessor":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as Processor
    elif kind == "LlavaOnevisionImageProcessor":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil as Processor,
        )
    elif kind in LLAVA_PROCESSORS:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
    elif kind in CLIP_PROCESSORS:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    else:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Processor.from_dict(settings)


def _chat_template(folder: Path) -> str | None:
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (template := folders.read_json(folder / name).get("chat_template")):
            return template
    jinja = folder / "chat_template.jinja"
    return jinja.read_text(encoding="utf-8") if jinja.is_file() else None
