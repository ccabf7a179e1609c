"""LLaVA's data files as a data set that never stands in memory: rows found, checked, read when used, and put in order.

*Where rows are.* A JSON list, as LLaVA ships its data, or JSON lines. Rows are byte ranges, so that a file of any length
costs one buffer: only brackets and quotation marks are counted. A broken row therefore does not hide its neighbours,
unless a bracket itself is missing.

*Checked before training.* `build_index` reads every row once and checks what can be checked: JSON, turns, the picture,
the length. What is wrong is named with file and row number, and the run is refused unless bad rows are to be skipped. The
index is a memory-mapped file of `RECORD` entries, 28 bytes a row.

*The order of samples.* Several sources with weights, grouped by modality and length as LLaVA groups them. The order is a
function of the seed, the epoch and the sizes, never of what ran before: every process and every resumed run computes
the same one. It costs eight bytes a row.

    text = Text(lab.tokenizer, lab.image_id, image_tokens=144, context=lab.context, stage="instruct")
    index = build_index(Source("rows.json"), text, Path("rows.index"), problems=Problems())
    LlavaData([Source("rows.json")], [index], text)[0]  # {"ids", "labels", "picture"}

Sources: haotian-liu/LLaVA @ c121f04 ``docs/Finetune_Custom_Data.md`` (the format) and ``llava/train/llava_trainer.py``
(get_modality_length_grouped_indices). Differences to the latter: sources may have weights, and the last batch is filled
from the next epoch, so that every step has the same number of samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from llava_lab.checks import is_list, number, reading, shown
from llava_lab.errors import DataError, OptionError, PictureError, one_line
from llava_lab.models.pictures import read_picture
from llava_lab.models.text import read_row
from llava_lab.results import file_hash, whole_file
from llava_lab.training.text import FORMATS, STAGES, count_words, read_turns, tokenise, tokens_at_most

log = logging.getLogger(__name__)

# -- where rows are ------------------------------------------------------------------------

CHUNK = 1 << 20  # bytes read at a time

MOST_BYTES = 1 << 26  # of a row; LLaVA's longest has some 100,000

# a whole string, or one mark; possessive, so that a string of megabytes costs no memory beside itself
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\]]', re.DOTALL)
_SPACE = b" \t\r\n"


def row_spans(path: Path) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of every row, in order.

    Raises DataError for a file that is missing, empty, of neither form, or that ends inside a row.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the data file {path} ({error.strerror or error})") from None
    with file:
        head = file.read(CHUNK)
        file.seek(0)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
            raise DataError(f"{path} is UTF-16 or UTF-32 text; expected UTF-8, save it anew as that")
        head = head.lstrip(b"\xef\xbb\xbf" + _SPACE)[:1]
        if head == b"[":
            yield from _listed(file, path)
        elif head == b"{" or path.suffix == ".jsonl":
            yield from _lines(file)
        else:
            raise DataError(f"{path} is neither a JSON list nor JSON lines; expected LLaVA's format, a list of conversations")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    start = 0
    for line in file:
        stop = start + len(line)
        if line.strip(_SPACE):
            yield start, stop
        start = stop


def _listed(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    buffer, base, at = b"", 0, 0  # `base` is the byte of the file at which `buffer` begins
    depth, start, row = 0, 0, 0
    while chunk := file.read(max(CHUNK, len(buffer) - at)):  # what is long is not read again for every chunk
        buffer, base, at = buffer[at:] + chunk, base + at, 0
        if len(buffer) > 2 * MOST_BYTES:
            raise DataError(f"{path} row {row} has a string of more than {MOST_BYTES:,} bytes; shorten it")
        for token in _TOKEN.finditer(buffer):
            mark = token.group()
            if mark == b'"':  # a string that goes on in the next chunk
                at = token.start()
                break
            if depth == 1 and mark not in (b"]", b"}"):
                _refuse_between(buffer[at : token.start()], path, row)
                start = base + token.start()
            at = token.end()
            depth += (mark in (b"{", b"[")) - (mark in (b"}", b"]"))
            if depth == 1 and mark != b"[":  # a row's last mark; the list's own opening is none
                yield start, base + token.end()
                row += 1
    if depth != 0:
        raise DataError(f"{path} ends inside row {row}: a bracket or a quotation mark of that row, or the list's own, is missing")


def _refuse_between(between: bytes, path: Path, row: int) -> None:
    if odd := between.strip(_SPACE + b","):
        raise DataError(f"{path} has {odd[:30]!r} before row {row}; expected a list of rows like {{...}}, {{...}}")


# -- rows, checked and read ----------------------------------------------------------------

RECORD = np.dtype([("start", "<i8"), ("size", "<i4"), ("row", "<i4"), ("words", "<i4"), ("picture", "<u8")])
TOKENISED_FIRST = 64  # rows of every file tokenised in any case: a template that does not fit shows at once
WRITE_ROWS = 8192  # records held before they are written
NAMED = 5  # problems shown in an error

PictureKey = Callable[[Path], int]


@dataclass(frozen=True)
class Source:
    """One data file. `weight`: times it is used in an epoch; `suffix`: a response format of `FORMATS`."""

    file: str | os.PathLike
    images: str | os.PathLike | None = None  # folder its picture names start from; None is the file's own
    weight: float = 1.0
    suffix: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.suffix, str) or self.suffix not in FORMATS:
            raise OptionError(f"suffix must be one of {', '.join(FORMATS)}, got {self.suffix!r}")
        if not number("weight", self.weight) > 0:
            raise OptionError(f"weight must be above 0, got {self.weight}")
        for name, value in (("file", self.file), ("images", self.images)):
            if not isinstance(value, (str, os.PathLike)) and (value is not None or name == "file"):
                raise OptionError(f"{name} of a source must be a path, got {shown(value)}")

    @property
    def path(self) -> Path:
        return Path(self.file)

    @property
    def folder(self) -> Path:
        return Path(self.images) if self.images is not None else self.path.parent


def as_sources(data: str | os.PathLike | Source | Sequence[Source]) -> list[Source]:
    """What an entry takes as data, as sources. Raises OptionError when there is none, and for anything else."""
    given: list[Any] = list(data) if is_list(data) else [data]
    if not given:
        raise OptionError("no data: give at least one file in LLaVA's format")
    for one in given:
        if not isinstance(one, (Source, str, os.PathLike)):
            raise OptionError(f"data must be a file in LLaVA's format, a Source, or a list of these; got {shown(one)}")
    return [one if isinstance(one, Source) else Source(one) for one in given]


@dataclass(frozen=True)
class Text:
    """How rows become tokens: everything of the model that the data needs."""

    tokenizer: Any
    image_id: int
    image_tokens: int
    context: int
    stage: str
    system: bool = True
    cut_long: bool = False  # cut a row at the context, as LLaVA does, where an answer's beginning still fits

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise OptionError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")

    def encode(self, row: Any, suffix: str) -> tuple[np.ndarray, np.ndarray, str | None]:
        """Token ids, labels (both int64 (T,)) and the picture's name of one row."""
        turns, picture = read_turns(row, stage=self.stage, suffix=suffix)
        return *self._tokens(turns, picture), picture

    def check(self, row: Any, suffix: str, *, tokens: bool) -> tuple[int, str | None]:
        """The row's words and picture; tokenised only where `tokens` or its length ask for it."""
        turns, picture = read_turns(row, stage=self.stage, suffix=suffix)
        fixed = 256 * self.system + (self.image_tokens if picture else 0)
        if tokens or tokens_at_most(turns, stage=self.stage, fixed=fixed) > self.context:
            self._tokens(turns, picture)
        return count_words(turns), picture

    def _tokens(self, turns: list[tuple[str, str]], picture: str | None) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = tokenise(
            self.tokenizer,
            turns,
            picture=picture is not None,
            stage=self.stage,
            image_id=self.image_id,
            image_tokens=self.image_tokens,
            system=self.system,
        )
        if len(ids) > self.context:
            if not self.cut_long or not (labels[1 : self.context] >= 0).any():
                raise DataError(f"{len(ids)} tokens with its picture, the model's context is {self.context}; shorten its answer")
            ids, labels = ids[: self.context], labels[: self.context]
        return ids, labels


@dataclass
class Problems:
    """What is wrong with rows; `refuse` raises it, unless bad rows are to be skipped."""

    skip: bool = False
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, file: Path, row: int, why: str) -> None:
        self.count += 1
        line = f"{file} row {row}: {why}"
        if self.skip:
            log.warning("skipped %s", line)
        if len(self.named) < 1000:
            self.named.append(line)

    def refuse(self) -> None:
        """Raise DataError naming the first problems, if there are any and they are not to be skipped."""
        if self.count and not self.skip:
            more = f" (and {self.count - NAMED} more)" if self.count > NAMED else ""
            raise DataError(f"{'; '.join(self.named[:NAMED])}{more}; mend the rows, or skip them with skip_bad (--skip-bad)")


def build_index(
    source: Source, text: Text, out: Path, *, problems: Problems, key: PictureKey | None = None, progress: bool = True
) -> np.ndarray:
    """Check every row of a source and write its index to `out`; gives it back memory-mapped, (rows,) of `RECORD`.

    `key` names a picture file's content (see `features`); without it pictures are only looked for.
    An index that `out` already holds for the same file and settings is used again.
    Raises DataError for a file that cannot be read as rows; rows that are wrong go to `problems`.
    """
    if not _is_file(source.path):
        raise DataError(f"no such data file: {shown(source.path)}")
    sign = json.loads(json.dumps(_signature(source, text, key is not None)))
    note = out.with_suffix(".json")
    try:
        if json.loads(note.read_text()) == {**sign, "index": file_hash(out)}:
            return open_index(out)
    except (OSError, ValueError):
        pass  # there is none, or what is there is damaged
    before = problems.count
    key_of = lru_cache(4096)(lambda name: _picture_key(source.folder / name, key))
    bar = tqdm(
        total=source.path.stat().st_size, unit="B", unit_scale=True, desc=f"checking {source.path.name}", disable=not progress
    )
    with whole_file(out) as temporary, temporary.open("wb") as file, reading(source.path) as rows, bar:
        records: list[tuple[int, int, int, int, int]] = []
        for number, (start, stop) in enumerate(row_spans(source.path)):
            bar.update(stop - bar.n)
            rows.seek(start)
            try:
                if stop - start > MOST_BYTES:
                    raise DataError(f"it has {stop - start:,} bytes, at most {MOST_BYTES:,} are read; shorten it")
                row = _parse(rows.read(stop - start))
                words, picture = text.check(row, source.suffix, tokens=number < TOKENISED_FIRST)
                code = key_of(picture) if picture is not None else 0
            except DataError as error:
                problems.add(source.path, number, str(error))
                continue
            records.append((start, stop - start, number, words if code else -words, code))
            if len(records) == WRITE_ROWS:
                np.array(records, RECORD).tofile(file)
                records.clear()
        np.array(records, RECORD).tofile(file)
        note.unlink(missing_ok=True)  # of what stood here before
    if problems.count == before:  # an index with gaps is built again, so that what it skips is listed again
        with whole_file(note) as temporary:
            temporary.write_text(json.dumps({**sign, "index": file_hash(out)}))
    return open_index(out)


def open_index(path: Path) -> np.ndarray:
    """A written index, memory-mapped; (rows,) of `RECORD`."""
    if path.stat().st_size == 0:
        return np.zeros(0, RECORD)
    return np.memmap(path, RECORD, "r")


class LlavaData(Dataset):
    """Rows of several sources in one numbering; a row is read from its file when it is asked for.

    `data[i]` is ``{"ids", "labels", "picture"}``; `picture` is what `see` makes of the row's picture key and
    path (cached features or pixels), None for text alone. Raises DataError naming file and row.
    """

    def __init__(
        self, sources: Sequence[Source], indexes: Sequence[np.ndarray], text: Text, see: Callable[[int, Path], Any] | None = None
    ) -> None:
        self.sources, self.indexes, self.text, self.see = list(sources), list(indexes), text, see
        self.ends = np.cumsum([len(index) for index in indexes])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def sizes(self) -> list[int]:
        return [len(index) for index in self.indexes]

    @property
    def weights(self) -> list[float]:
        return [source.weight for source in self.sources]

    @property
    def words(self) -> np.ndarray:
        """Words of every row, negative without a picture, int32 (rows,)."""
        return np.concatenate([np.asarray(index["words"]) for index in self.indexes])

    def __getitem__(self, number: int) -> dict[str, Any]:
        source, record = self._record(number)
        with reading(source.path) as file:
            file.seek(int(record["start"]))
            raw = file.read(int(record["size"]))
        try:
            ids, labels, name = self.text.encode(_parse(raw), source.suffix)
            picture = self.see(int(record["picture"]), source.folder / name) if name is not None and self.see else None
        except (DataError, PictureError) as error:
            raise DataError(f"{source.path} row {record['row']}: {error}") from None
        return {"ids": ids, "labels": labels, "picture": picture}

    def pictures(self) -> Iterable[tuple[int, Path, Source, int]]:
        """Every distinct picture once: its key, its path, and the source and row that first name it."""
        for source, index in zip(self.sources, self.indexes, strict=True):
            keys, first = np.unique(np.asarray(index["picture"]), return_index=True)
            with source.path.open("rb") as file:
                for key, at in zip(keys.tolist(), first.tolist(), strict=True):
                    if key:
                        file.seek(int(index["start"][at]))
                        picture = read_row(_parse(file.read(int(index["size"][at]))))[1]
                        if picture is not None:
                            yield key, source.folder / picture, source, int(index["row"][at])

    def without(self, keys: Iterable[int]) -> LlavaData:
        """The same data without the rows of these pictures."""
        bad = np.array(sorted(keys), np.uint64)
        good = [np.asarray(index)[~np.isin(index["picture"], bad)] if len(bad) else index for index in self.indexes]
        return LlavaData(self.sources, good, self.text, self.see)

    def _record(self, number: int) -> tuple[Source, Any]:
        which = int(np.searchsorted(self.ends, number, side="right"))
        if not number >= 0 or which == len(self.ends):
            raise IndexError(number)
        index = self.indexes[which]
        return self.sources[which], index[number - int(self.ends[which]) + len(index)]


def read_pixels(preprocessing: Any, fit: str | None) -> Callable[[int, Path], np.ndarray]:
    """A `see` for runs without a cache: the picture as the tower takes it, float32 (3, S, S)."""
    return lambda key, path: preprocessing.pixels(read_picture(path), fit)[0].numpy()


def unreadable(rows: LlavaData, problems: Problems, *, progress: bool = True) -> set[int]:
    """Read every picture once; gives the keys of those that cannot be, which also go to `problems` with file and row."""
    bad: set[int] = set()
    for key, path, source, row in tqdm(list(rows.pictures()), desc="reading pictures", unit="picture", disable=not progress):
        try:
            if rows.see is not None and key not in bad:
                rows.see(key, path)
        except (DataError, PictureError) as error:
            problems.add(source.path, row, str(error))
            bad.add(key)
    return bad


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"broken JSON ({one_line(error)})") from None
    except RecursionError:
        raise DataError("broken JSON (brackets within brackets without end)") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for any file
        return False


def _picture_key(path: Path, key: PictureKey | None) -> int:
    if not _is_file(path):
        raise DataError(f"missing picture {shown(path)}")
    return key(path) if key else 1


def _signature(source: Source, text: Text, keyed: bool) -> dict[str, Any]:
    words = hashlib.blake2b(text.tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()
    return {
        "file": [str(source.path.resolve()), file_hash(source.path), str(source.folder.resolve()), source.suffix],
        "text": [words, text.image_id, text.image_tokens, text.context, text.stage, text.system, text.cut_long, keyed],
        "record": str(RECORD.descr),
    }


# -- the order of samples ------------------------------------------------------------------

GROUPINGS = ("none", "modality")


def epoch_rows(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch in random order, int64; source s's rows are numbered after those of the sources before it.

    A weight says how many times an epoch goes through its source: 2 twice, 0.5 half of it, and the other
    half in the next epoch. LLaVA joins its sources with equal weights, 1.
    """
    parts, first = [], 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = round(size * weight)
        turns = np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64)
        fixed = np.random.default_rng((seed, 61, source)).permutation(size)  # the same in every epoch: its parts differ
        parts.append(first + fixed[turns % max(size, 1)])
        first += size
    rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return np.random.default_rng((seed, 62, epoch)).permutation(rows)


def group_by_modality(words: np.ndarray, *, batch: int, chunks: int, rng: np.random.Generator) -> np.ndarray:
    """Positions 0..n-1 such that a global batch has one modality and samples of like length, int64 (n,).

    `words` int (n,) counts each sample's words, negative for text without a picture. `chunks` is processes
    times accumulated batches: a global batch is `chunks` batches of about equal length. Nothing is dropped:
    the last global batch of each modality goes to the end, joined.
    """
    seen, text = np.flatnonzero(words > 0), np.flatnonzero(words <= 0)
    if not len(seen) or not len(text):
        both = _group_by_length(np.abs(words), batch=batch, chunks=chunks, rng=rng)
        return np.concatenate(both) if both else np.zeros(0, np.int64)
    groups = [
        [part[places] for places in _group_by_length(np.abs(words[part]), batch=batch, chunks=chunks, rng=rng)]
        for part in (seen, text)
    ]
    whole = groups[0][:-1] + groups[1][:-1]
    shuffled = [whole[i] for i in rng.permutation(len(whole))]
    return np.concatenate([*shuffled, np.sort(np.concatenate([groups[0][-1], groups[1][-1]]))])


def _group_by_length(lengths: np.ndarray, *, batch: int, chunks: int, rng: np.random.Generator) -> list[np.ndarray]:
    order, whole = rng.permutation(len(lengths)), batch * chunks
    parts = [order[start : start + whole] for start in range(0, len(order), whole)]
    return [_even(part[np.argsort(-lengths[part], kind="stable")], lengths, chunks) for part in parts]


def _even(part: np.ndarray, lengths: np.ndarray, chunks: int) -> np.ndarray:
    """A global batch split into equally many samples of about equal total length, one chunk after the other."""
    if chunks == 1 or len(part) % chunks:
        return np.concatenate([part[i::chunks] for i in range(chunks)])
    shared_out: list[list[int]] = [[] for _ in range(chunks)]
    total = np.zeros(chunks)
    for index in part:
        shortest = int(np.argmin(total))
        shared_out[shortest].append(int(index))
        total[shortest] += lengths[index] if len(shared_out[shortest]) < len(part) // chunks else math.inf
    return np.array([index for chunk in shared_out for index in chunk], np.int64)


class Order(Sampler[int]):
    """Rows for the `total` samples of a whole run, epoch after epoch; the last epoch may be cut short."""

    def __init__(
        self,
        words: np.ndarray,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        total: int,
        batch: int,
        chunks: int,
        group: str,
        seed: int,
    ) -> None:
        if group not in GROUPINGS:
            raise OptionError(f"group must be one of {', '.join(GROUPINGS)}, got {group!r}")
        if not all(0 <= weight < math.inf for weight in weights) or not samples_per_epoch(sizes, weights):
            raise OptionError(f"weights must be 0 or more and leave some rows; got {list(weights)} for {list(sizes)} rows")
        self.words, self.sizes, self.weights = words, list(sizes), list(weights)
        self.total, self.batch, self.chunks, self.group, self.seed = total, batch, chunks, group, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        count, epoch = 0, 0
        while count < self.total:
            for row in self.epoch(epoch)[: self.total - count]:
                yield int(row)
                count += 1
            epoch += 1

    def epoch(self, number: int) -> np.ndarray:
        """The rows of one epoch in the order they are used, int64."""
        rows = epoch_rows(self.sizes, self.weights, seed=self.seed, epoch=number)
        if self.group == "none":
            return rows
        rng = np.random.default_rng((self.seed, 63, number))
        return rows[group_by_modality(np.asarray(self.words[rows]), batch=self.batch, chunks=self.chunks, rng=rng)]


def samples_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """How many samples one epoch has."""
    return sum(round(size * weight) for size, weight in zip(sizes, weights, strict=True))
