"""What this machine and this installation can do: `llava-lab doctor`.

Gathers facts, changes nothing and asks no other machine. Importing it needs the standard
library only, because ``run.py`` looks for a browser with it before anything is installed;
torch is imported when the report is asked for. How a checkpoint differs from LLaVA-1.5 (``doctor --model``) is in
`llava_lab.models.differences`.

    print(render(examine()))
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "matplotlib")
OPTIONAL = {  # distribution -> what is missing without it
    "captum": "reference values in the tests",
    "jupyterlab": "the notebooks",
    "ipywidgets": "the widgets",
    "anywidget": "the widgets",
    "playwright": "the browser tests",
}
BROWSER_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSER_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
SIZES = {"small": 8_000_000, "7B": 7_000_000_000}  # parameters
TINY_FILES = ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json")
ASSETS = Path(__file__).parent / "assets"


def find_chromium() -> str | None:
    """Path of a Chromium-like browser: $CHROME_PATH, then the search path, then the usual places."""
    named = os.environ.get("CHROME_PATH")
    if named:
        return named if Path(named).is_file() else None  # a wrong wish is said, not silently replaced
    commands = (path for command in BROWSER_COMMANDS if (path := shutil.which(command)))
    return next(commands, None) or next((place for place in BROWSER_PLACES if Path(place).is_file()), None)


def examine() -> dict[str, Any]:
    """The whole report as plain data: versions, machine, device, and each optional part with a reason."""
    browser = find_chromium()
    missing = "none found (set CHROME_PATH); needed for the browser tests"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in ("llava-lab", *VERSIONS)},
        "machine": {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": _memory("SC_PHYS_PAGES"),
            "free_memory_gb": _memory("SC_AVPHYS_PAGES"),
            "free_disk_gb": round(shutil.disk_usage(ASSETS.parent).free / 1e9, 1),
        },
        "compute": _compute(),
        "parts": {
            **{name: _optional_part(name, use) for name, use in OPTIONAL.items()},
            "chromium": {"usable": browser is not None, "why": browser or missing},
            "tiny": check_folder(ASSETS / "tiny"),
        },
    }


def check_folder(folder: Path) -> dict[str, Any]:
    """Whether a model folder has every file and its weights' header can be read; the weights stay on disk."""
    missing = [name for name in TINY_FILES if not (folder / name).is_file()]
    if missing:
        return {"usable": False, "why": f"{folder.name} lacks {', '.join(missing)}"}
    try:
        count = _count_tensors(folder / "model.safetensors")
        json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        return {"usable": False, "why": f"{folder.name} cannot be read: {error}"}
    megabytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    return {"usable": True, "why": f"{count} tensors, {megabytes:.1f} MB"}


def render(report: dict[str, Any]) -> str:
    """The report as aligned text for a person."""
    machine, compute = report["machine"], report["compute"]
    memory, free, disk = (
        "unknown" if machine[name] is None else f"{machine[name]} GB" for name in ("memory_gb", "free_memory_gb", "free_disk_gb")
    )
    rows = [
        ("python", f"{report['python']} ({report['platform']})"),
        *((name, version or "not installed") for name, version in report["versions"].items()),
        ("cores", str(machine["cores"])),
        ("memory", f"{memory} in all, {free} free"),
        ("disk", f"{disk} free"),
        ("threads", str(compute["threads"])),
    ]
    for size in SIZES:
        if size in compute:
            chosen = compute[size]
            rows.append((f"{size} models", f"{chosen['dtype']} on {chosen['device']} ({chosen['why']})"))
    if "problem" in compute:
        rows.append(("problem", compute["problem"]))
    parts = [(name, f"{'yes' if part['usable'] else 'NO '}  {part['why']}") for name, part in report["parts"].items()]
    width = max(len(name) for name, _ in rows + parts)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in [*rows, ("", ""), ("usable parts", ""), *parts])


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional_part(name: str, use: str) -> dict[str, Any]:
    version = _version(name)
    why = f"{version} ({use})" if version else f"not installed; needed for {use}"
    return {"usable": version is not None, "why": why}


def _memory(pages: str) -> float | None:
    """Gigabytes by POSIX sysconf; None where the system has no such count (Windows; free pages on macOS)."""
    names = getattr(os, "sysconf_names", {})
    if pages not in names or "SC_PAGE_SIZE" not in names:
        return None
    return round(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _compute() -> dict[str, Any]:
    """The device and dtype `load` chooses when it is given none, for a small and a large model, with its reason."""
    try:
        import torch

        from llava_lab.models import choose_device
    except (ImportError, OSError) as error:  # OSError: a library of torch's own that does not fit this system
        return {"threads": 0, "problem": f"torch cannot be loaded: {error}"}
    report: dict[str, Any] = {"threads": torch.get_num_threads()}
    for size, parameters in SIZES.items():
        placement = choose_device(parameters=parameters)
        dtype = str(placement.dtype).removeprefix("torch.")
        report[size] = {"device": str(placement.device), "dtype": dtype, "why": placement.why}
    return report


def _count_tensors(file: Path) -> int:
    """Tensors of a safetensors file, by its header: 8 bytes of length, then JSON; offsets must end at the file's end."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length < 100_000_000:
            raise ValueError(f"{file.name} is not a safetensors file")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != 8 + length + end:
        raise ValueError(f"{file.name} is {file.stat().st_size} bytes, its header says {8 + length + end}; it is cut off")
    return len(header)
