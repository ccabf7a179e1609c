"""A small LLaVA as three ONNX graphs, written so that one set serves asking, maps, knockout and the lens.

    graphs = export(ll.load("tiny"))  # {"see": bytes, "say": bytes, "read": bytes}

- ``see``: the square's pixels (1, 3, S, S), normalised -> the picture's tokens (P, D), and how far the picture is from the
  training's, 1 being the limit (NaN where that was not measured).
- ``say``: token ids (N,), the picture's tokens, the cache (T, L, 2, G, d) of what came before, and an additive mask (N, T + N)
  -> the stream before each layer and after the last (L + 1, N, D), what is new for the cache (N, L, 2, G, d), the mean of
  the heads' attention (L, N, T + N), and the sizes of what each layer adds at its attention and of what it is added to (L, N, 2).
  A prompt, one token of an answer, and an answer read again under another mask are the same graph with other N and T.
- ``read``: states (K, D) -> logits (K, V), through the final norm and the output head. The model's logits are its last
  states read, and the logit lens is any others read.

Matrices are kept in 16 bits and cast once when a session is made; all arithmetic is float32. Weights of bfloat16 lose nothing
by that above 2^-14, and less than 3e-8 below.

Source: transformers ``LlamaDecoderLayer``, ``CLIPVisionTransformer``, whose own modules are called here.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_lab.errors import LabError, OptionError
from llava_lab.models.card import fingerprint
from llava_lab.models.layout import (
    connector_of,
    feature_layers,
    has_class_token,
    image_token_count,
    language_layers,
    language_model,
    used_vision_layers,
    vision_tower,
)

if TYPE_CHECKING:
    from llava_lab.models import Lab

MOST = 60_000_000  # parameters; a page of more than some hundred megabytes opens nowhere
LARGE = 1024  # elements of a weight from which on it is kept in 16 bits
OPSET = 20
NEEDS = "the page needs onnx, onnxscript and onnxruntime, which `pip install 'llava-lab[page]'` brings"


def export(lab: Lab) -> dict[str, bytes]:
    """The model's graphs by name, each a whole ONNX file.

    Raises OptionError for a model that a page cannot hold: too large, another tower or language model than CLIP and Llama.
    """
    check_model(lab)
    square = torch.zeros(1, 3, lab.preprocessing.size, lab.preprocessing.size)
    say = Say(lab)
    ids, old = torch.zeros(7, dtype=torch.long), 5
    ids[1] = say.image_id
    picture = torch.zeros(image_token_count(lab.model), say.width)
    cache = torch.zeros(old, *say.kept)
    new, before = torch.export.Dim("new", max=4096), torch.export.Dim("before", max=4096)
    some = torch.export.Dim("some", max=4096)
    both = torch.export.Dim.DYNAMIC  # before + new, which export works out
    return {
        "see": _graph(See(lab), {"pixels": square}, ("picture", "distance"), None),
        "say": _graph(
            say,
            {"ids": ids, "picture": picture, "cache": cache, "mask": torch.zeros(7, 7 + old)},
            ("states", "fresh", "attention", "sizes"),
            ({0: new}, None, {0: before}, {0: both, 1: both}),
        ),
        "read": _graph(Read(lab), {"states": torch.zeros(5, say.width)}, ("logits",), ({0: some},)),
    }


def check_model(lab: Lab) -> None:
    """Raises OptionError where the graphs would not be this model's."""
    vision, text = lab.model.config.vision_config, lab.model.config.text_config
    if (vision.model_type, text.model_type) != ("clip_vision_model", "llama"):
        raise OptionError(
            f"a page holds a CLIP vision tower and a Llama language model, and {lab.name!r} has {vision.model_type} and "
            f"{text.model_type}; ask it with `llava-lab app`"
        )
    count = sum(parameter.numel() for parameter in lab.model.parameters())
    if count > MOST:
        raise OptionError(
            f"a page holds at most {MOST:,} parameters, and {lab.name!r} has {count:,}; ask it with `llava-lab app`"
        )
    if not lab.one_square or len(feature_layers(lab.model.config)) != 1 or lab.dtype != torch.float32:
        raise OptionError(f"a page holds a model of one square, one feature layer, loaded as float32; {lab.name!r} is another")


class See(nn.Module):
    """Pixels to the picture's tokens; the tower's layers behind the one that LLaVA reads are left out."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        tower: Any = vision_tower(lab.model)
        self.embeddings, self.norm = tower.embeddings, tower.pre_layrnorm
        self.layers = nn.ModuleList(used_vision_layers(lab.model))
        self.connector = connector_of(lab.model)
        self.first = int(has_class_token(lab.model))
        known = None if lab.scope is None else lab.scope.pictures
        known = known if known is not None and known.tower == fingerprint(tower) else None
        width = lab.model.config.vision_config.hidden_size
        self.middle = nn.Buffer(torch.zeros(width) if known is None else torch.from_numpy(known.mean).clone())
        self.whitening = nn.Buffer(torch.zeros(width, width) if known is None else torch.from_numpy(known.whitening).clone())
        self.limit = float("nan") if known is None else known.threshold

    def forward(self, pixels: Float[Tensor, "1 3 S S"]) -> tuple[Float[Tensor, "P D"], Tensor]:
        states = self.norm(self.embeddings(pixels))
        for layer in self.layers:
            states = layer(states, attention_mask=None)
            states = states[0] if isinstance(states, tuple) else states
        features = states[:, self.first :]
        away = (features[0].mean(0) - self.middle) @ self.whitening
        return self.connector(features)[0], away.square().mean()[None] / self.limit


class Say(nn.Module):
    """The decoder's layers, with everything that the page looks at as an output."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        text, decoder = lab.model.config.text_config, language_model(lab.model)
        self.embed, self.rotary = lab.model.get_input_embeddings(), decoder.rotary_emb
        self.layers = nn.ModuleList(language_layers(lab.model))
        self.image_id, self.width = lab.image_id, text.hidden_size
        self.heads, self.groups = text.num_attention_heads, text.num_key_value_heads
        self.kept = (len(self.layers), 2, self.groups, text.head_dim)

    def forward(
        self,
        ids: Int[Tensor, " N"],
        picture: Float[Tensor, "P D"],
        cache: Float[Tensor, "T L 2 G d"],
        mask: Float[Tensor, "N K"],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shown = ids == self.image_id
        place = (shown.long().cumsum(0) - 1).clamp_min(0)
        stream = torch.where(shown[:, None], picture[place], self.embed(ids))
        at = torch.arange(mask.shape[1] - ids.shape[0], mask.shape[1])
        cos, sin = self.rotary(stream[None], at[None])
        states, fresh, seen, sizes = [stream], [], [], []
        for number, layer in enumerate(self.layers):
            normed = layer.input_layernorm(stream)
            query, key, value = (self._heads(part(normed)) for part in _projections(layer.self_attn))
            query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin)
            fresh.append(torch.stack([key[0].transpose(0, 1), value.transpose(0, 1)], 1))  # N 2 G d
            whole = torch.cat([cache[:, number], fresh[-1]]).permute(1, 2, 0, 3)  # 2 G K d
            keys, values = whole.repeat_interleave(self.heads // self.groups, 1)
            weights = (query[0] @ keys.transpose(1, 2) * layer.self_attn.scaling + mask).softmax(-1)  # H N K
            branch = layer.self_attn.o_proj((weights @ values).transpose(0, 1).flatten(1))
            seen.append(weights.mean(0))
            sizes.append(torch.stack([branch.norm(dim=-1), stream.norm(dim=-1)], -1))
            stream = stream + branch
            stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
            states.append(stream)
        return torch.stack(states), torch.stack(fresh, 1), torch.stack(seen), torch.stack(sizes)

    def _heads(self, part: Float[Tensor, "N W"]) -> Float[Tensor, "H N d"]:
        return part.unflatten(1, (-1, self.kept[-1])).transpose(0, 1)


class Read(nn.Module):
    """States to logits."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.norm, self.head = language_model(lab.model).norm, lab.model.get_output_embeddings()

    def forward(self, states: Float[Tensor, "K D"]) -> Float[Tensor, "K V"]:
        return self.head(self.norm(states))


def _projections(attention: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    return attention.q_proj, attention.k_proj, attention.v_proj


# -- files ----------------------------------------------------------------------------------


def _graph(module: nn.Module, given: dict[str, Tensor], outputs: tuple[str, ...], shapes: Any) -> bytes:
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(given.values()),
            dynamo=True,
            input_names=list(given),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise LabError("torch.onnx gave no graph; " + NEEDS)
    return in_16_bits(program.model_proto)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs and warns about itself; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise LabError(f"{NEEDS} ({error})") from None
    finally:
        for log, level in zip(loggers, before, strict=True):
            log.setLevel(level)


def in_16_bits(model: Any) -> bytes:
    """An ONNX model as a file, its large float32 weights kept as float16 with a cast in front of their use."""
    from onnx import TensorProto, helper, numpy_helper

    graph, casts = model.graph, []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT or int(np.prod(weight.dims)) < LARGE:
            continue
        name, values = weight.name, numpy_helper.to_array(weight)
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise LabError(f"the weight {name} has values up to {np.abs(values).max():.3g}, too large for 16 bits")
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_16"))
        casts.append(helper.make_node("Cast", [f"{name}_16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for name in ("metadata_props", "doc_string"):
        for node in graph.node:
            node.ClearField(name)
    del graph.value_info[:]
    file = io.BytesIO()
    file.write(model.SerializeToString())
    return file.getvalue()
