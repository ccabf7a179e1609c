"""``llava-lab page``: a whole small model in one HTML file, for people who have no Python.

llava-lab page --model tiny --out demo.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply
from llava_lab.errors import OptionError
from llava_lab.shipped import MODELS


def add_commands(add: Add) -> None:
    about = "the whole model as one HTML file that runs in the browser: no server, no network"
    command = add("page", page, about, "nothing")
    command.add_argument("--model", default="tiny", help=f"{', '.join(MODELS)}, a folder, or a hub name (default: tiny)")
    common.add_output(command, "--out", "default: page.html", "page.html")
    command.add_argument("--package", metavar="FILE", help="onnxruntime-web's package file (default: fetched once by npm)")


def page(args: argparse.Namespace) -> Reply:
    """Raises OptionError for a name that is no page's and for a model that a page cannot hold."""
    import llava_lab as ll
    from llava_lab.page import write_page

    if Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--out wants a file ending in .html, got {args.out!r}")
    built = write_page(ll.load(args.model, device="cpu", dtype="float32"), args.out, package=args.package)
    return Reply(built.to_dict(), built.describe())
