"""Where the parts of a LLaVA model are, and where the picture sits in its sequence.

    layers = language_layers(lab.model)
    features, tokens = read_connector(lab.model, lab.pixels(picture))

Module paths differ between transformers versions and between vision towers, so each part is looked up among the known places and
its absence is an error, never a guess. Image tokens are found by their id; their number and place are checked, never assumed.

Source: transformers ``LlavaModel`` (5.x has no ``vision_model`` level in the CLIP tower, earlier ones do).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlavaConfig

from llava_lab.capture import hooked
from llava_lab.capture.watch import MEND
from llava_lab.checks import not_finite
from llava_lab.errors import CheckpointError, OptionError
from llava_lab.models import connectors

VISION_PATHS = ("model.vision_tower", "vision_tower")
CONNECTOR_PATHS = ("model.multi_modal_projector", "multi_modal_projector")
LANGUAGE_PATHS = ("model.language_model", "language_model")
INNER_PATHS = ("", "vision_model", "model")  # wrappers around the stack of layers
LAYER_PATHS = ("encoder.layers", "layers")


def vision_tower(model: nn.Module) -> nn.Module:
    """The picture encoder, class token and all."""
    return _find(model, VISION_PATHS, "vision tower")


def connector_of(model: nn.Module) -> nn.Module:
    """The connector from the vision width to the language width."""
    return _find(model, CONNECTOR_PATHS, "connector")


def read_connector(model: Any, pixel_values: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B P F"], Float[Tensor, "B Q D"]]:
    """What goes into the connector and what comes out of it, for pictures that all give one square.

    Vision tower and connector run once, the language model does not. Gradients and evaluation mode are the caller's choice.
    """
    passes: list[tuple[Tensor, Tensor]] = []
    with hooked(connector_of(model), after=lambda module, args, output: passes.append((args[0], output))):
        model.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    if len(passes) != 1:
        raise CheckpointError(f"expected the connector to run once for a batch of pictures, it ran {len(passes)} times")
    if count := not_finite(passes[0][1]):
        raise CheckpointError(
            f"expected finite image tokens, got NaN or infinity in {count:,} of {passes[0][1].numel():,}; {MEND}"
        )
    return passes[0]


def replace_connector(model: nn.Module, new: nn.Module) -> None:
    """Set another module in the connector's place; config and grid follow in `llava_lab.models.swap`."""
    for path in CONNECTOR_PATHS:
        home, _, name = path.rpartition(".")
        parent = _get(model, home)
        if parent is not None and isinstance(getattr(parent, name, None), nn.Module):
            setattr(parent, name, new)
            return
    raise CheckpointError(f"{type(model).__name__} has no connector at {' or '.join(CONNECTOR_PATHS)}; expected a LLaVA model")


def language_model(model: nn.Module) -> nn.Module:
    """The decoder stack with its embeddings and final norm, without the output head."""
    return _find(model, LANGUAGE_PATHS, "language model")


def has_tower_attention(model: nn.Module) -> bool:
    """Whether the vision tower is a transformer; a convolutional net has no attention to look at."""
    return bool(getattr(getattr(vision_tower(model), "config", None), "num_attention_heads", 1))


def require_tower_attention(model: nn.Module, what: str) -> None:
    """Raises OptionError where the vision tower has no attention."""
    if not has_tower_attention(model):
        raise OptionError(
            f"{what} needs attention inside the vision tower, and {type(vision_tower(model)).__name__} is a convolutional net; "
            "use gradcam or occlusion, which look through any tower"
        )


def vision_layers(model: nn.Module) -> list[nn.Module]:
    """Every encoder layer of the vision tower, in order."""
    require_tower_attention(model, "this")
    return _layers(vision_tower(model), "vision tower")


def language_layers(model: nn.Module) -> list[nn.Module]:
    """Every decoder layer of the language model, in order."""
    return _layers(language_model(model), "language model")


def used_vision_layers(model: nn.Module) -> list[nn.Module]:
    """The vision layers whose output can reach the answer: those that feed hidden_states[feature_layer].

    LLaVA reads the states before the last layer (-2), so the last layer runs for nothing.
    """
    layers = vision_layers(model)
    return layers[: last_feature_state(model.config, len(layers))]


def feature_layers(config: LlavaConfig) -> list[int]:
    """The configured feature layers as a list, as they are written (negative ones count from the end)."""
    chosen = config.vision_feature_layer
    return list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]


def last_feature_state(config: LlavaConfig, layers: int) -> int:
    """Index of the deepest hidden state the connector reads; state 0 is the embedding, state n follows layer n."""
    states = layers + 1
    chosen = feature_layers(config)
    if not chosen or not all(type(layer) is int and -states <= layer < states for layer in chosen):
        raise CheckpointError(f"vision_feature_layer {chosen} must lie within the {states} hidden states of the vision tower")
    return max(layer % states for layer in chosen)


# Packages whose layers hold packed weights.
QUANTISED = (
    "bitsandbytes",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torchao",
    "auto_gptq",
    "gptqmodel",
    "awq",
)


def is_quantized(model: nn.Module) -> bool:
    """Whether weights are packed into 8 or 4 bits (bitsandbytes and its like), so that they are not numbers to read."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None or settings is not None:
        return True
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        return True
    return any(type(module).__module__.startswith(QUANTISED) for module in model.modules())


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights wait on the disk or in main memory until their layer runs (``device_map``)."""
    return any(parameter.is_meta for parameter in model.parameters())


def has_class_token(model: nn.Module) -> bool:
    """Whether the vision tower puts a class token before the patches (CLIP does, SigLIP does not)."""
    tower = vision_tower(model)
    embeddings = next((found for path in INNER_PATHS if (found := _get(_get(tower, path), "embeddings")) is not None), None)
    return getattr(embeddings, "class_embedding", None) is not None


def image_token_count(model: nn.Module) -> int:
    """How many tokens the model makes of one picture, from its configuration."""
    grid = connectors.token_grid(model.config)
    return grid[0] * grid[1] if grid else vision_tokens(model)[1]


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """(rows, cols) of the image tokens: the vision patches, or fewer where the connector puts several into one.

    Raises CheckpointError when tokens are not patches.
    """
    config: LlavaConfig = model.config
    side, count = vision_tokens(model)
    if count != side * side:
        strategy = config.vision_feature_select_strategy
        raise CheckpointError(
            f"the model makes {count} image tokens of {side}x{side} patches (vision_feature_select_strategy={strategy!r}); "
            "a map needs one token per patch, so the class token must be dropped: use a checkpoint that does"
        )
    return connectors.token_grid(config) or (side, side)


def vision_tokens(model: nn.Module) -> tuple[int, int]:
    """Patches along a side of the picture, and the tokens that the tower passes on: the patches, with a class token or not."""
    config: LlavaConfig = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side**2 + int(has_class_token(model)) - int(config.vision_feature_select_strategy == "default")


def require_patch_tokens(model: nn.Module, what: str) -> None:
    """Raises OptionError where the connector makes one token of several patches, so that the tower's patches have no place."""
    config: LlavaConfig = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    if (grid := connectors.token_grid(config)) not in (None, (side, side)):
        raise OptionError(
            f"{what} needs an image token for each of the {side}x{side} vision patches, and the connector makes "
            f"{grid[0]}x{grid[1]} tokens of them; choose what looks at image tokens"
        )


def cell_pixels(model: nn.Module) -> int:
    """Side of one grid cell in the model's square, pixels: a vision patch, or what a connector makes one token of."""
    config: LlavaConfig = model.config
    patch = config.vision_config.patch_size
    seen = config.vision_config.image_size // patch * patch
    rows = patch_grid(model)[0]
    if seen % rows:
        raise CheckpointError(f"the connector's {rows}x{rows} tokens do not divide the {seen} pixels the model sees")
    return seen // rows


def processor_patch(model: nn.Module) -> int:
    """The patch size from which a stock LlavaProcessor counts as many image tokens as the model makes.

    The vision tower's where the connector keeps its tokens; else the side that gives the connector's grid.
    """
    config: LlavaConfig = model.config
    return config.vision_config.patch_size if connectors.token_grid(config) is None else cell_pixels(model)


def image_spans(token_ids: np.ndarray, image_id: int, count: int, pictures: int = 1) -> list[tuple[int, int]]:
    """[start, stop) of each picture's image tokens in an expanded sequence; they must be `count` in one block."""
    where = np.flatnonzero(token_ids == image_id)
    if len(where) != count * pictures:
        raise CheckpointError(f"expected {count * pictures} image tokens (id {image_id}) in the sequence, found {len(where)}")
    spans = [(int(block[0]), int(block[-1]) + 1) for block in where.reshape(pictures, count)]
    for start, stop in spans:
        if stop - start != count:
            raise CheckpointError(f"the {count} image tokens must stand in one block, found them spread over {start}..{stop - 1}")
    return spans


def expand_image(token_ids: np.ndarray, image_id: int, count: int, pictures: int = 1) -> np.ndarray:
    """The sequence with `count` image tokens a picture, given one with a single token for each or one already expanded."""
    where = np.flatnonzero(token_ids == image_id)
    if len(where) == pictures and count != 1:
        times = np.ones(len(token_ids), int)
        times[where] = count
        token_ids = np.repeat(token_ids, times)
    image_spans(token_ids, image_id, count, pictures)
    return token_ids


def _layers(part: nn.Module, name: str) -> list[nn.Module]:
    for inner in INNER_PATHS:
        for path in LAYER_PATHS:
            found = _get(_get(part, inner), path)
            if isinstance(found, nn.ModuleList):
                return list(found)
    raise CheckpointError(f"the {name} ({type(part).__name__}) has no list of layers at {', '.join(LAYER_PATHS)}")


def _find(model: nn.Module, paths: tuple[str, ...], name: str) -> nn.Module:
    for path in paths:
        found = _get(model, path)
        if isinstance(found, nn.Module):
            return found
    raise CheckpointError(f"{type(model).__name__} has no {name} at {' or '.join(paths)}; expected a LLaVA model")


def _get(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split(".") if path else []:
        module = getattr(module, name, None)
    return module
