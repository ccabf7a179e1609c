"""``llava-lab train``: the shipped model from nothing (``tiny``), or one of LLaVA's stages on data in its format.

    llava-lab train tiny --out runs/tiny
    llava-lab train smol --out runs/smol
    llava-lab train --data captions.json --stage align --out runs/mine
    llava-lab train --data mix.json --stage instruct --model runs/mine/align/model --out runs/mine

Under ``accelerate launch -m llava_lab.cli train ...`` the same command runs in every process.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llava_lab.cli_commands import Reply
from llava_lab.errors import OptionError

ABOUT = "train the shipped model from nothing, or a stage on your own data"
RECIPES = ("llava-1.5-7b", "llava-1-7b")


def add_options(train: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    train.add_argument("name", nargs="?", choices=("tiny", "smol"), help="which recipe to train from nothing")
    train.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoints, logs and the finished model")
    train.add_argument("--stage", action="append", metavar="NAME", help="with --data align or instruct; else only this stage")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    train.add_argument("--compile", action="store_true", help="tiny, smol: fuse small operations, wants a C++ compiler")
    train.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="tiny, smol: times the steps (default: 1)")
    data = train.add_argument_group("on your own data")
    data.add_argument(
        "--data",
        action="append",
        metavar="FILE[,weight=W][,suffix=NAME][,images=DIR]",
        help="a file in LLaVA's format, JSON list or lines; repeatable",
    )
    data.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help=f"where unnamed numbers come from ({RECIPES[0]})")
    data.add_argument("--epochs", type=float, help="times through the data")
    data.add_argument("--steps", type=positive, help="instead of epochs")
    data.add_argument("--batch", type=positive, help="samples in a step, over all processes")
    data.add_argument("--device-batch", type=positive, metavar="N", help="samples a process takes at a time")
    data.add_argument("--rate", type=float, help="peak learning rate")
    data.add_argument("--connector-rate", type=float, metavar="RATE", help="the connector's own")
    data.add_argument("--lora", action="store_true", help="instruct: adapters on the language model (LLaVA-1.5's LoRA recipe)")
    data.add_argument("--fit", help="how pictures become square: pad or crop")
    data.add_argument("--bf16", action="store_true", help="bfloat16 where it is safe (autocast)")
    data.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    data.add_argument("--report-to", default="none", metavar="NAME", help="tensorboard, trackio, wandb (default: none)")
    data.add_argument("--save-every", type=positive, default=200, metavar="N", help="steps between checkpoints (default: 200)")
    data.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read rows ahead (default: 0)")
    data.add_argument("--cache", metavar="DIR", help="folder for vision features (default: the user's cache folder)")
    data.add_argument("--no-cache", action="store_true", help="run the vision tower at every step instead")
    data.add_argument("--skip-bad", action="store_true", help="leave out rows that are wrong, and list them")
    data.add_argument("--cut-long", action="store_true", help="cut rows at the model's context, as LLaVA does")


def train(args: argparse.Namespace) -> Reply:
    logging.getLogger("llava_lab").setLevel(logging.INFO)  # hours of silence would look like a hang
    if args.data:
        if args.name:
            raise OptionError(f"give {args.name} or --data, not both")
        return _stage(args)
    if args.name is None:
        raise OptionError("what to train? give tiny, or --data FILE --stage align|instruct")
    if args.name == "smol":
        from llava_lab.training.smol import SMOL, train_smol

        recipe = replace(SMOL, seed=args.seed)
        options = {"stages": args.stage, "resume": args.resume, "steps_scale": args.steps_scale}
        folder = train_smol(args.out, recipe=recipe, fused=args.compile, **options)
        return Reply({"model": "smol", "out": str(folder), "seed": args.seed}, f"connector and LoRA are in {folder}")
    from llava_lab.training import train as run_recipe

    options = {"stages": args.stage, "resume": args.resume, "steps_scale": args.steps_scale, "seed": args.seed}
    folder = run_recipe(args.name, args.out, fused=args.compile, **options)
    return Reply({"model": args.name, "out": str(folder), "seed": args.seed}, f"the model is in {folder}")


def _stage(args: argparse.Namespace) -> Reply:
    import llava_lab as ll
    from llava_lab.training.two_stages import Running, train_stage

    stages = args.stage or []
    if len(stages) != 1:
        raise OptionError(f"--data trains one stage at a time: --stage align or --stage instruct, got {stages or 'none'}")
    stage, sources = _recipe(args, stages[0]), [read_source(text) for text in args.data]
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    lab = ll.load(args.model, device="cpu" if several else args.device, dtype=args.dtype)  # each process moves its own
    running = Running(
        seed=args.seed,
        bf16=args.bf16,
        device_batch=args.device_batch,
        checkpointing=args.checkpointing,
        report_to=args.report_to,
        save_every=args.save_every,
        workers=args.workers,
    )
    done = train_stage(
        lab,
        sources,
        stages[0],
        args.out,
        recipe=stage,
        steps=args.steps,
        resume=args.resume,
        skip_bad=args.skip_bad,
        cut_long=args.cut_long,
        cache=False if args.no_cache else args.cache or True,
        running=running,
    )
    if several:
        from accelerate import PartialState

        PartialState().destroy_process_group()
    data = {name: getattr(done, name) for name in ("folder", "steps", "of", "stopped", "seconds", "skipped")}
    data["loss"] = done.losses[-1] if done.losses else None
    text = f"{done.stopped} at step {done.steps} of {done.of}; the model is in {done.folder}"
    return Reply(data, "\n".join([text, *(f"skipped {line}" for line in done.skipped)]))


def read_source(text: str) -> Any:
    """``mix.json,weight=0.5,suffix=word,images=photos`` as a `Source`. Raises OptionError for another name."""
    from llava_lab.training.llava_data import Source

    file, *pairs = text.split(",")
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in ("weight", "suffix", "images"):
            raise OptionError(f"--data wants FILE[,weight=W][,suffix=NAME][,images=DIR], got {pair!r}")
        given[name] = value
    if "weight" in given:
        try:
            given["weight"] = float(given["weight"])
        except ValueError:
            raise OptionError(f"--data's weight must be a number, got {given['weight']!r}") from None
    return Source(file, **given)


def _recipe(args: argparse.Namespace, stage: str) -> Any:
    from llava_lab.training.recipe import LLAVA_RECIPES

    if stage not in ("align", "instruct"):
        raise OptionError(f"--stage must be align or instruct, got {stage!r}")
    recipe = LLAVA_RECIPES[args.recipe]
    chosen = recipe.stage(stage)
    if args.lora:
        if stage != "instruct" or recipe.instruct_lora is None:
            raise OptionError("--lora goes with --stage instruct of the recipe llava-1.5-7b")
        chosen = recipe.instruct_lora
    names = ("rate", "batch", "epochs", "connector_rate", "fit")
    return replace(chosen, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})
