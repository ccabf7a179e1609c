"""Vision features computed once and memory-mapped: the frozen tower runs once, for every connector, seed and epoch.

A folder is named by what decides the features: the tower's weights, which layers are read, the picture's
transform, the precision. Inside, a picture is known by its file's content, so the same file under two names
is computed once. Shards are written whole, first the features, then a checksum of each, then their keys; a shard without keys
does not exist. Nothing is ever changed in place, so runs may share a folder.

    cache = FeatureCache(lab)
    cache.prepare(rows, problems=Problems())
    cache.read(content_key(path))  # (patches, width)

Size: pictures x patches x width x bytes. For LLaVA-1.5's 558,000 pictures (576 x 1024, 2 bytes) that is
658 GB; `prepare` refuses what the disk cannot hold, and a run without a cache computes them as it goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llava_lab.capture import evaluating
from llava_lab.errors import DataError, OptionError, PictureError, one_line
from llava_lab.models import layout
from llava_lab.models.pictures import read_picture
from llava_lab.results import whole_file

if TYPE_CHECKING:
    from llava_lab.models import Lab
    from llava_lab.training.rows import LlavaData, Problems

log = logging.getLogger(__name__)

SHARD = 512  # pictures in a file
BATCH = 16  # pictures through the tower at a time
SPARE = 1 << 28  # bytes of disk that stay free
WORDS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}  # numpy has no bfloat16


def content_key(path: Path) -> int:
    """A picture file's name by its bytes: 64 bits, never 0. Raises DataError when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"picture {path} cannot be read ({error.strerror or error})") from None
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def default_folder() -> Path:
    """Where features are kept unless the user says: ``$LLAVA_LAB_CACHE`` or the user's cache folder."""
    return Path(os.environ.get("LLAVA_LAB_CACHE") or Path.home() / ".cache" / "llava-lab") / "features"


def tower_features(model: Any, pixels: Tensor) -> Tensor:
    """What the connector reads of pictures: (B, K, W), selected layers joined, no gradients, no autocast.

    Source: transformers ``LlavaModel.get_image_features``; haotian-liu/LLaVA ``clip_encoder.py`` (feature_select).
    """
    config, tower = model.config, layout.vision_tower(model)
    off = torch.autocast(pixels.device.type, enabled=False) if torch.is_autocast_enabled(pixels.device.type) else nullcontext()
    with evaluating(tower), torch.no_grad(), off:
        dtype = next(tower.parameters()).dtype
        states = tower(pixels.to(dtype), output_hidden_states=True, return_dict=True).hidden_states
        drop = int(config.vision_feature_select_strategy == "default")
        return torch.cat([states[layer][:, drop:] for layer in layout.feature_layers(config)], -1)


class FeatureCache:
    """Features of pictures by content key; `read` gives one picture's (K, W) without copying the rest."""

    def __init__(self, lab: Lab, folder: str | os.PathLike | None = None, *, fit: str | None = None) -> None:
        self.lab, self.fit = lab, lab.preprocessing.mode(fit)
        tower = layout.vision_tower(lab.model)
        self.dtype = next(tower.parameters()).dtype
        self.folder = (Path(folder) if folder is not None else default_folder()) / self._name(tower)
        self._open()

    def _name(self, tower: torch.nn.Module) -> str:
        digest = hashlib.blake2b(digest_size=12)
        for name, value in sorted(tower.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        config: Any = self.lab.model.config
        settings = {
            "layers": layout.feature_layers(config),
            "select": config.vision_feature_select_strategy,
            "tower": config.vision_config.to_dict(),
            "processor": self.lab.processor.image_processor.to_dict(),
            "fit": self.fit,
        }
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _open(self) -> None:
        self._shards: list[tuple[Path, np.ndarray, np.ndarray | None]] = []  # place, values mapped, checksums of its rows
        keys: list[np.ndarray] = []
        for path in sorted(self.folder.glob("*.keys.npy")) if self.folder.is_dir() else []:
            stem = str(path).removesuffix(".keys.npy")
            sums = Path(f"{stem}.sums.npy")  # older shards have none
            try:
                names, values = np.load(path), np.load(f"{stem}.npy", mmap_mode="r")
                known = np.load(sums) if sums.is_file() else None
                if names.dtype != np.uint64 or len(values) != len(names) or (known is not None and len(known) != len(names)):
                    raise ValueError(f"{len(values)} features of {len(names)} pictures")
            except (OSError, ValueError, EOFError, TypeError) as error:
                log.warning("%s is damaged and is left out (%s)", path, one_line(error))
                continue
            self._shards.append((path, values, known))
            keys.append(names)
        where = [np.stack([np.full(len(k), i), np.arange(len(k))], 1) for i, k in enumerate(keys)]
        joined = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        order = np.argsort(joined, kind="stable")
        self.keys = joined[order]
        self.where = np.concatenate(where)[order] if where else np.zeros((0, 2), np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: int) -> bool:
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        return at < len(self.keys) and int(self.keys[at]) == key

    def read(self, key: int, path: Path | None = None) -> Tensor:
        """One picture's features, (K, W) in the tower's precision."""
        if key not in self:
            raise DataError(f"no features of picture {path or key} in {self.folder}; it changed after it was prepared")
        shard, row = self.where[int(np.searchsorted(self.keys, np.uint64(key)))].tolist()
        place, values, sums = self._shards[shard]
        found = np.array(values[row])
        if sums is not None and zlib.crc32(found.data) != sums[row]:
            raise DataError(
                f"the features of picture {path or key} in {place} are damaged; remove that file to have them made anew"
            )
        features = torch.from_numpy(found)
        return features.view(torch.bfloat16) if self.dtype == torch.bfloat16 else features

    def prepare(self, data: LlavaData, *, problems: Problems, progress: bool = True) -> set[int]:
        """Compute what is missing of a data set's pictures; gives the keys of pictures that cannot be read.

        Those also go to `problems`, with file and row. Raises OptionError when the disk cannot hold the rest.
        """
        wanted = [picture for picture in data.pictures() if picture[0] not in self]
        self._check_room(len({key for key, *_ in wanted}))
        bad: set[int] = set()
        done: set[int] = set()
        keys: list[int] = []
        features: list[np.ndarray] = []
        pending: list[tuple[int, np.ndarray]] = []
        for key, path, source, row in tqdm(wanted, desc="vision features", unit="picture", disable=not (progress and wanted)):
            if key in done or key in bad:
                continue
            try:
                if content_key(path) != key:
                    raise DataError(f"picture {path} changed while the run was prepared")
                pending.append((key, self.lab.preprocessing.pixels(read_picture(path), self.fit)[0].numpy()))
            except (DataError, PictureError) as error:
                problems.add(source.path, row, str(error))
                bad.add(key)
                continue
            done.add(key)
            if len(pending) == BATCH:
                self._compute(pending, keys, features)
            if len(keys) >= SHARD:
                self._write(keys, features)
        self._compute(pending, keys, features)
        self._write(keys, features)
        self._open()
        return bad

    def _compute(self, pending: list[tuple[int, np.ndarray]], keys: list[int], features: list[np.ndarray]) -> None:
        if pending:
            pixels = torch.from_numpy(np.stack([pixels for _, pixels in pending])).to(self.lab.device)
            seen = tower_features(self.lab.model, pixels).cpu()
            features.append((seen.view(torch.uint16) if seen.dtype == torch.bfloat16 else seen).numpy())
            keys += [key for key, _ in pending]
            pending.clear()

    def _write(self, keys: list[int], features: list[np.ndarray]) -> None:
        if not keys:
            return
        numbers = np.array(keys, np.uint64)
        name = hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()
        values = np.concatenate(features).astype(WORDS[self.dtype], copy=False)
        sums = np.array([zlib.crc32(row) for row in values], np.uint32)
        for end, array in ((".npy", values), (".sums.npy", sums), (".keys.npy", numbers)):
            with whole_file(self.folder / f"{name}{end}") as temporary, temporary.open("wb") as file:
                np.save(file, array)
        keys.clear()
        features.clear()

    def _check_room(self, count: int) -> None:
        config: Any = self.lab.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        width = config.vision_config.hidden_size * len(layout.feature_layers(config))
        needed = count * side * side * width * self.dtype.itemsize
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if needed + SPARE > free:
            raise OptionError(
                f"features of {count:,} pictures need {needed / 1e9:.1f} GB in {there}, {free / 1e9:.1f} GB are free; "
                "choose another folder (--cache) or compute them as the run goes (--no-cache)"
            )
