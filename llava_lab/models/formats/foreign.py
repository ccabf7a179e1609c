"""What a stranger's checkpoint may not do: take memory it does not hold, take for ever, take the process down.

Sizes are checked before anything is allocated: what config.json describes against what the heads of the weight files hold.
Files are plain files of a bounded size. The tokenizer is tried, and a chat template is always run, in another process
(`in_child`) with limits. Shipped checkpoints are ours and skip what costs time.

    check_files(folder)
    check_sizes(config, LlavaForConditionalGeneration, held, folder)
    text = render(template, messages=messages, add_generation_prompt=True)
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llava_lab.checks import reading, regular_file
from llava_lab.errors import CheckpointError, one_line

CHILD = Path(__file__).with_name("in_child.py")
SECONDS = 20  # of computing in the other process; a tokenizer of 250,000 words loads in two
PATIENCE = 120.0  # seconds for it as a whole; a busy machine is slow
JSON_BYTES = 200_000_000  # of one JSON file; the largest tokenizers have 40 MB
WHOLE = 2**31  # a size or an id in config.json is below it
# words no tokenizer of ours stops at: what is asked, long runs, other scripts, half a character, marks
TEXTS = (
    *("USER: <image>\nWhat color is the car? ASSISTANT:", "The car is red.", "", " " * 2000, "a" * 2000, "\n" * 500, "1" * 500),
    *("naïve façade été", "日本語の文章です。", "🚗🏠" * 50, "\u0301" * 200, "\0\x01\x7f", "</s><s><unk>", "a.b,c;d:e!" * 100),
)

_COUNTS = re.compile(r"(num|n)_.*(layers?|experts?|blocks?|stages?)$|(^|_)depths?$")
_NOT_LEARNT = re.compile(r"position_ids$|inv_freq$|num_batches_tracked$")  # whole numbers, or made anew
_FLOATS = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))


# -- files ----------------------------------------------------------------------------------


def check_files(folder: Path) -> None:
    """Refuse a folder with anything in it that is neither a plain file nor a folder, or with JSON of an absurd size."""
    try:
        for path in folder.iterdir():
            if not path.exists() or path.is_dir():
                continue
            regular_file(path, CheckpointError)
            if path.suffix == ".json" and path.stat().st_size > JSON_BYTES:
                raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; expected less than {JSON_BYTES:,}")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror or error})") from None


def check_config(config: Any, tensors: int, where: Path) -> None:
    """Refuse sizes that nothing can have, in config.json as it stands there; `tensors` is how many the weights are.

    Raises CheckpointError for a count of layers or experts above `tensors`, and for a whole number of 2^31 and more.
    """
    for name, value in _numbers(config):
        if abs(value) >= WHOLE:
            said = f"{value:,}" if value.bit_length() < 100 else f"a number of {value.bit_length()} bits"
            raise CheckpointError(f"{where} says {name} {said}, which no model has")
        if tensors and value > tensors and _COUNTS.search(name):
            raise CheckpointError(f"{where} says {name} {value:,}, and the weights are only {tensors:,} tensors")


def check_sizes(config: Any, model_class: Any, held: int, where: Path) -> None:
    """Refuse a configuration of more than twice the `held` parameters, before a model of that size is made.

    The model is made without its numbers. What is missing by name is said when the weights are read.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            described = sum(value.numel() for value in model_class(config).parameters())
    except Exception as error:  # a configuration that no model can be made of fails anywhere in transformers or torch
        raise CheckpointError(f"{where} does not describe a model ({one_line(error)})") from None
    if described > 2 * held:
        raise CheckpointError(f"{where} describes a model of {described:,} parameters, and the weights hold {held:,}")


def check_learnt(kinds: Mapping[str, str], where: Path) -> None:
    """Refuse weights that are not floating-point numbers: they would be rounded into some, not loaded as they are.

    `kinds` are dtypes by name, as safetensors spells them.
    """
    wrong = [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _FLOATS and not _NOT_LEARNT.search(name)]
    if wrong:
        raise CheckpointError(
            f"{where} holds weights that are no floating-point numbers, for example {wrong[0]}; "
            "they cannot be loaded as they were saved"
        )


def check_archive(file: Path) -> None:
    """Refuse a ``.bin`` that unpacks to more than it is. One of before 2020 is no archive, and is read as it comes."""
    size = file.stat().st_size
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > size or any(member.compress_type for member in members):
        raise CheckpointError(f"{file} is packed in a way that torch does not write; fetch it again")


def read_bin(file: Path, *, heads_only: bool = False) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file, mapped where the file allows it; with `heads_only` they have shapes and no values.

    Raises CheckpointError for a file that is damaged, holds more than tensors, or a tensor larger than what is stored of it.
    """
    options: dict[str, Any] = {"map_location": "meta" if heads_only else "cpu", "weights_only": True}
    try:
        check_archive(regular_file(file, CheckpointError))
        try:
            data = torch.load(file, mmap=not heads_only, **options)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            data = torch.load(file, **options)  # the format before 2020 cannot be mapped
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}") from None
    except Exception as error:  # whatever a damaged pickle makes torch raise
        raise CheckpointError(
            f"{file} is cut off, damaged, or holds more than weights ({type(error).__name__}); fetch it again"
        ) from None
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise CheckpointError(f"{file} does not hold a dict of named tensors")
    check_stored(data, file)
    return data


def check_stored(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a tensor that says it is larger than what is stored of it."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{file} holds {name} {tuple(value.shape)}, which is more than is stored of it; fetch it again")


def kind_of(value: Tensor) -> str:
    """A tensor's dtype as safetensors spells it, where it is of floating point."""
    if not value.is_floating_point():
        return str(value.dtype).removeprefix("torch.")
    return {"bfloat16": "BF16"}.get(str(value.dtype).removeprefix("torch."), f"F{8 * value.element_size()}")


def _numbers(config: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    if depth > 20:
        raise CheckpointError("config.json is nested more than 20 levels deep")
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _numbers(value, str(key), depth + 1)
    elif isinstance(config, list):
        if len(config) > 1_000_000:
            raise CheckpointError(f"config.json has {len(config):,} entries in {name}")
        for value in config:
            yield from _numbers(value, name, depth + 1)
    elif isinstance(config, int):
        yield name, config


# -- in another process ---------------------------------------------------------------------


def check_tokenizer(folder: Path) -> None:
    """Try a folder's tokenizer on texts that are hard for some, in another process. Raises CheckpointError."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model")]
    stamps = tuple((str(file), stat.st_mtime_ns, stat.st_size) for file in files if file.is_file() for stat in [file.stat()])
    if wrong := _tried(str(folder), stamps):
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({wrong})")


def render(template: Any, **variables: Any) -> str:
    """What a chat template writes, in another process under limits. Raises CheckpointError (one line)."""
    if not isinstance(template, str):
        raise CheckpointError(f"the chat template must be text, got a {type(template).__name__}")
    answer = _rendered(json.dumps({"seconds": SECONDS, "render": {"template": template, "variables": variables}}))
    if "error" in answer:
        raise CheckpointError(f"the checkpoint's chat template cannot be used ({answer['error']})")
    return str(answer["value"])


@lru_cache(maxsize=64)
def _tried(folder: str, stamps: tuple[Any, ...]) -> str | None:
    error: str | None = _apart(json.dumps({"seconds": SECONDS, "encode": {"folder": folder, "texts": TEXTS}})).get("error")
    return error


@lru_cache(maxsize=256)
def _rendered(job: str) -> dict[str, Any]:
    return _apart(job)


def _apart(job: str) -> dict[str, Any]:
    """What the other process answers to a job in JSON, or ``{"error": why it did not}``."""
    try:
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
        # -P: the script's own folder is no place to import from
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD)], input=job.encode(), capture_output=True, timeout=PATIENCE, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {PATIENCE:g} seconds"}
    except OSError as error:
        return {"error": one_line(error)}
    if done.returncode == -getattr(signal, "SIGXCPU", 24) or done.returncode == -9:
        return {"error": "it took more time or memory than a file of its kind may"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip() and "BACKTRACE" not in line]
        return {"error": f"it ended its process, code {done.returncode}; {said[-1][:200] if said else 'nothing was said'}"}
    return answer


# -- GGUF -----------------------------------------------------------------------------------

_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value by its type
_TEXT, _ARRAY = 8, 9


def check_gguf(file: Path) -> None:
    """Walk a GGUF's head, so that nothing it counts goes beyond its end. Raises CheckpointError.

    Source: ggml ``docs/gguf.md`` (versions 2 and 3).
    """
    size = regular_file(file, CheckpointError).stat().st_size
    try:
        with reading(file) as data:
            magic, version, tensors, entries = struct.unpack("<4sIQQ", data.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("it is no GGUF of version 2 or 3")
            _bounded(max(tensors, entries), size // 12)
            for _ in range(entries):
                _skip_text(data, size)
                _skip_value(data, _read(data, "<I"), size, 0)
            for _ in range(tensors):
                _skip_text(data, size)
                axes = [_read(data, "<Q") for _ in range(_bounded(_read(data, "<I"), 8))]
                _, offset = _read(data, "<I"), _read(data, "<Q")
                _bounded(max(offset, math.prod(axes) // 8), size)  # no quantisation has more than 8 values in a byte
    except (struct.error, ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as a Llama in GGUF form ({one_line(error)})") from None


def _read(data: BinaryIO, form: str) -> int:
    value: int = struct.unpack(form, data.read(struct.calcsize(form)))[0]
    return value


def _bounded(value: int, limit: int) -> int:
    if value > limit:
        raise ValueError(f"{value:,} where at most {limit:,} can be")
    return value


def _skip_text(data: BinaryIO, size: int) -> None:
    data.seek(_bounded(_read(data, "<Q"), size - data.tell()), os.SEEK_CUR)


def _skip_value(data: BinaryIO, kind: int, size: int, depth: int) -> None:
    if kind in _FIXED:
        data.seek(_FIXED[kind], os.SEEK_CUR)
    elif kind == _TEXT:
        _skip_text(data, size)
    elif kind == _ARRAY:
        inner, count = _read(data, "<I"), _read(data, "<Q")
        if inner in _FIXED:
            data.seek(_bounded(count * _FIXED[inner], size - data.tell()), os.SEEK_CUR)
        else:
            _bounded(depth, 4)
            for _ in range(_bounded(count, size - data.tell())):
                _skip_value(data, inner, size, depth + 1)
    else:
        raise ValueError(f"a value of the unknown type {kind}")
