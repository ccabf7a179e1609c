"""A small LLaVA as three ONNX graphs, written so that one set serves asking, maps, knockout and the lens; and their proof.

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

They are asked as the page asks them, and compared with the model they were made from. `Engine` is what the page's ``engine.js``
does, over any three functions: ONNX sessions, or the torch modules themselves.

    proof = agreement(lab, engine(graphs))
    proof.same, proof.logits  # every token the same; the largest difference of a logit

Source: transformers ``LlamaDecoderLayer``, ``CLIPVisionTransformer``, whose own modules are called here.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_lab.capture import undisturbed
from llava_lab.checks import undoing, warnings_kept
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
from llava_lab.worlds.picturebook import ask_about, scene

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

    def undo() -> None:
        for log, level in zip(loggers, before, strict=True):
            log.setLevel(level)

    try:
        with undoing(undo), warnings_kept():
            for log in loggers:
                log.setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise LabError(f"{NEEDS} ({error})") from None


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


# -- asked beside the model -----------------------------------------------------------------

LEAST = float(np.finfo(np.float32).min)
LIMIT = 48  # tokens of an answer
TOLERANCE = 2e-3  # of a logit between the page's arithmetic and torch's: weights are rounded and sums ordered otherwise
SCENES = 6

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Answer:
    """What the graphs gave for one question. S positions: the prompt's and the answer's tokens but the last."""

    ids: Int[np.ndarray, " n"]
    logits: Float[np.ndarray, "n V"]  # that each token was chosen from
    states: Float[np.ndarray, "states S D"]
    attention: list[np.ndarray]  # row after row, (L, positions up to its own)
    sizes: Float[np.ndarray, "L S 2"]  # attention output, residual stream
    distance: float


@dataclass(frozen=True)
class Agreement:
    """How the graphs' answers compare with the model's, over `questions` of the drawn world."""

    questions: int
    tokens: int
    same: bool
    logits: float  # largest absolute difference over every answer token's whole row


class Engine:
    """A picture seen once, then questions answered token by token from a growing cache."""

    def __init__(self, see: Callable[..., Arrays], say: Callable[..., Arrays], read: Callable[..., Arrays]) -> None:
        self.see, self.say, self.read = see, say, read

    def answer(
        self, pixels: Float[np.ndarray, "1 3 S S"], prompt: Int[np.ndarray, " T"], *, eos: frozenset[int], image_id: int,
        kept: tuple[int, ...], limit: int = LIMIT,
    ) -> Answer:  # fmt: skip
        """Greedy, as `llava_lab.models.generation.generate`; `kept` is the cache's shape for one position."""
        picture, distance = self.see(pixels)
        cache = np.zeros((0, *kept), np.float32)
        ids, answer, rows, seen, states, sizes = prompt, [], [], [], [], []
        while True:
            new, past = len(ids), len(cache)
            mask = np.triu(np.full((new, past + new), LEAST, np.float32), past + 1)
            state, fresh, attention, size = self.say(ids, picture, cache, mask)
            cache = np.concatenate([cache, fresh])
            states.append(state)
            sizes.append(size)
            seen += [attention[:, row, : past + row + 1] for row in range(new)]
            (logits,) = self.read(state[-1, -1:])
            allowed = logits[0].copy()
            allowed[image_id] = -np.inf
            token = int(allowed.argmax())
            if token in eos:
                break
            answer.append(token)
            rows.append(logits[0])
            if len(answer) == limit:
                break
            ids = np.array([token], np.int64)
        return Answer(
            np.array(answer, np.int64),
            np.array(rows),
            np.concatenate(states, 1),
            seen,
            np.concatenate(sizes, 1),
            float(distance[0]),
        )


def engine(graphs: Mapping[str, bytes]) -> Engine:
    """ONNX files as an `Engine`, on one thread as in a page. Raises LabError where onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise LabError(f"{NEEDS} ({error})") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def call(name: str) -> Callable[..., Arrays]:
        session = onnxruntime.InferenceSession(graphs[name], options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        return lambda *given: tuple(session.run(None, dict(zip(names, given, strict=True))))

    return Engine(call("see"), call("say"), call("read"))


def torch_engine(lab: Lab) -> Engine:
    """The modules that `export` writes, before they are written."""

    def call(module: Any) -> Callable[..., Arrays]:
        def run(*given: np.ndarray) -> Arrays:
            with undisturbed(lab.model):
                out = module(*(torch.from_numpy(part) for part in given))
            return tuple(part.numpy() for part in (out if isinstance(out, tuple) else (out,)))

        return run

    return Engine(call(See(lab)), call(Say(lab)), call(Read(lab)))


def agreement(lab: Lab, graphs: Engine, *, scenes: int = SCENES) -> Agreement:
    """Ask the first `scenes` of the test split two questions and for a caption each, both ways."""
    largest, tokens, questions, same = 0.0, 0, 0, True
    for index in range(scenes):
        drawn = scene("test", index)
        picture = np.asarray(drawn.picture())
        pixels = lab.pixels(picture)
        asked = ask_about(drawn, np.random.default_rng(index), 2)
        for question in [*(one.text for one in asked), "Describe the picture."]:
            run = lab.ask(picture, question, max_new_tokens=LIMIT)
            given = ask(lab, graphs, pixels, run.question)
            logits = logits_of(lab, run)
            questions, tokens = questions + 1, tokens + len(logits)
            same = same and given.ids.tolist() == run.token_ids[slice(*run.segments["answer"])].tolist()
            if given.logits.shape == logits.shape:
                largest = max(largest, float(np.abs(given.logits - logits).max()))
    return Agreement(questions, tokens, same, largest)


def ask(lab: Lab, graphs: Engine, pixels: Tensor, question: str) -> Answer:
    """One question about a square of pixels, in the model's own prompt."""
    prompt = lab.sequence(question).token_ids
    kept = Say(lab).kept
    return graphs.answer(pixels.numpy(), prompt, eos=lab.eos_ids, image_id=lab.image_id, kept=kept)


def logits_of(lab: Lab, run: Any) -> Float[np.ndarray, "n V"]:
    """The model's own logits for each token of the answer."""
    start, stop = run.segments["answer"]
    with undisturbed(lab.model):
        return lab.model(**lab.inputs(run)).logits[0, start - 1 : stop - 1].numpy()
