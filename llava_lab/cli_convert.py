"""``llava-lab convert FOLDER OUT``: an original LLaVA folder in transformers' format."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from llava_lab.cli_commands import Reply

ABOUT = "write an original LLaVA folder (llava_llama, LoRA, or a projector) in transformers' format"


def add_options(command: argparse.ArgumentParser) -> None:
    """What ``llava-lab convert`` takes beside the common options."""
    command.add_argument("folder", metavar="FOLDER", help="the original: a folder or a hub name")
    command.add_argument("out", metavar="OUT", help="the folder to write; it must not exist or be empty")
    command.add_argument("--vision", metavar="NAME", help="folder or hub name of its CLIP tower (default: as its config says)")
    command.add_argument("--base", metavar="NAME", help="the language model under a LoRA or a projector (default: as named)")


def convert(args: argparse.Namespace) -> Reply:
    """Convert, and say what was written."""
    from llava_lab.models.original_convert import convert as write

    made = write(args.folder, args.out, vision=args.vision, base=args.base)
    return Reply({**asdict(made), "folder": str(made.folder)}, f"wrote {made.folder}\nfrom {made.source}")
