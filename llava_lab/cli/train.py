"""The commands that make things: train, ablate, convert, data.

    llava-lab train tiny --out runs/tiny
    llava-lab train smol --out runs/smol
    llava-lab train photo --pictures holiday --out runs/holiday
    llava-lab train --data captions.json --stage align --out runs/mine
    llava-lab train --data mix.json --stage instruct --model runs/mine/align/model --out runs/mine
    llava-lab ablate --start runs/tiny --out runs/ablation --save ablation.npz
    llava-lab ablate --data photos --pictures train --test-pictures everyday --stage1 with --budget samples --out runs/photos
    llava-lab convert FOLDER OUT
    llava-lab data picturebook --n 1000 --out book

Under ``accelerate launch -m llava_lab.cli train ...`` the same command runs in every process. ``ablate`` trains connectors
side by side from the same start and says which of them answers better; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import asdict, replace
from typing import Any

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, positive
from llava_lab.errors import LabError, OptionError

RECIPES = ("llava-1.5-7b", "llava-1-7b")
STAGES = {"with": (True,), "without": (False,), "both": (True, False)}


def add_commands(add: Add) -> None:
    command = add("train", train, "train the shipped model from nothing, or a stage on your own data")
    command.set_defaults(model=None)
    command.add_argument("name", nargs="?", choices=("tiny", "smol", "photo"), help="which recipe to train from nothing")
    command.add_argument(
        "--pictures", metavar="FOLDER", help="photo: photographs named by what they show, or in folders so named"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoints, logs and the finished model")
    command.add_argument("--stage", action="append", metavar="NAME", help="with --data align or instruct; else only this stage")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    command.add_argument("--compile", action="store_true", help="a recipe: fuse small operations, wants a C++ compiler")
    command.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="a recipe: times the steps (default: 1)")
    own = command.add_argument_group("on your own data")
    own.add_argument(
        "--data",
        action="append",
        metavar="FILE[,weight=W][,suffix=NAME][,images=DIR]",
        help="a file in LLaVA's format, JSON list or lines; repeatable",
    )
    own.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help=f"where unnamed numbers come from ({RECIPES[0]})")
    own.add_argument("--epochs", type=float, help="times through the data")
    own.add_argument("--steps", type=positive, help="instead of epochs")
    own.add_argument("--batch", type=positive, help="samples in a step, over all processes")
    own.add_argument("--device-batch", type=positive, metavar="N", help="samples a process takes at a time")
    own.add_argument("--rate", type=float, help="peak learning rate")
    own.add_argument("--connector-rate", type=float, metavar="RATE", help="the connector's own")
    own.add_argument("--lora", action="store_true", help="instruct: adapters on the language model (LLaVA-1.5's LoRA recipe)")
    own.add_argument("--fit", help="how pictures become square: pad or crop")
    own.add_argument("--bf16", action="store_true", help="bfloat16 where it is safe (autocast)")
    own.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    own.add_argument("--report-to", default="none", metavar="NAME", help="tensorboard, trackio, wandb (default: none)")
    own.add_argument("--save-every", type=positive, default=200, metavar="N", help="steps between checkpoints (default: 200)")
    own.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read rows ahead (default: 0)")
    own.add_argument("--cache", metavar="DIR", help="folder for vision features (default: the user's cache folder)")
    own.add_argument("--no-cache", action="store_true", help="run the vision tower at every step instead")
    own.add_argument("--skip-bad", action="store_true", help="leave out rows that are wrong, and list them")
    own.add_argument("--cut-long", action="store_true", help="cut rows at the model's context, as LLaVA does")

    about = "train connectors side by side and say which answers better, or that it cannot be told"
    command = add("ablate", ablate, about, "model and seed")
    command.add_argument(
        "--connector",
        action="append",
        metavar="NAME[:OPTION=N,...]",
        help="repeatable (default: linear, mlp2x_gelu, and their controls bottleneck and linear2x)",
    )
    command.add_argument("--data", default="picturebook", help="picturebook (default), or photos with both folders")
    command.add_argument(
        "--pictures", metavar="FOLDER", help="of --data photos: photographs to train on, named by what they show"
    )
    command.add_argument("--test-pictures", metavar="FOLDER", help="of --data photos: photographs that no training sees")
    command.add_argument("--start", metavar="FOLDER", help="tower and language model, or our recipe's states (default: --model)")
    command.add_argument(
        "--language", metavar="FOLDER", help="another language model: a checkpoint, or language.pt of our recipe"
    )
    command.add_argument(
        "--out", required=True, metavar="DIR", help="folder for features and finished runs; goes on where it ends"
    )
    command.add_argument("--rates", metavar="R,R,R", help="rates to choose from on validation (default: 3e-4,1e-3,3e-3)")
    command.add_argument("--seeds", type=positive, default=5, help="runs of each connector (default: 5)")
    command.add_argument("--stage1", choices=STAGES, default="both", help="with or without alignment first (default: both)")
    command.add_argument("--budget", choices=("samples", "flops", "both"), default="both", help="what is equal (default: both)")
    command.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="times steps and pictures (default: 1)")
    command.add_argument("--validation", type=positive, default=200, metavar="N", help="pictures to choose on (default: 200)")
    command.add_argument("--test", type=positive, default=300, metavar="N", help="pictures of each test split (default: 300)")
    command.add_argument("--no-keep", action="store_true", help="do not save the models of the first seed")
    command.add_argument("--compile", action="store_true", help="fuse small operations (faster; needs a C++ compiler)")
    common.add_output(command, "--save", "keep the result in one .npz file")

    about = "write an original LLaVA folder (llava_llama, LoRA, or a projector) in transformers' format"
    command = add("convert", convert, about, "nothing")
    command.add_argument("folder", metavar="FOLDER", help="the original: a folder or a hub name")
    command.add_argument("out", metavar="OUT", help="the folder to write; it must not exist or be empty")
    command.add_argument("--vision", metavar="NAME", help="folder or hub name of its CLIP tower (default: as its config says)")
    command.add_argument("--base", metavar="NAME", help="the language model under a LoRA or a projector (default: as named)")

    command = add("data", data, "write a data set in LLaVA's format", "seed")
    command.add_argument("world", choices=("picturebook",), help="which world to draw")
    command.add_argument("--n", type=positive, required=True, help="pictures")
    command.add_argument("--split", default="train", help="default: train")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write to")


def train(args: argparse.Namespace) -> Reply:
    logging.getLogger("llava_lab").setLevel(logging.INFO)  # hours of silence would look like a hang
    if args.data:
        if args.name:
            raise OptionError(f"give {args.name} or --data, not both")
        return _train_stage(args)
    for name in ("model", "device", "dtype"):
        if getattr(args, name) is not None:
            raise OptionError(f"--{name} belongs to --data; a recipe has its own, so leave it out")
    if args.name is None:
        raise OptionError("what to train? give tiny, or --data FILE --stage align|instruct")
    if args.pictures and args.name != "photo":
        raise OptionError(f"--pictures belongs to the recipe photo, got {args.name}")
    options = {"stages": args.stage, "resume": args.resume, "steps_scale": args.steps_scale}
    if args.name == "photo":
        from llava_lab.training.photo.make import PHOTO, train_photo

        if not args.pictures:
            raise OptionError("photo is trained on photographs: give --pictures FOLDER, each named by what it shows")
        recipe = replace(PHOTO, seed=args.seed)
        folder = train_photo(args.pictures, args.out, recipe=recipe, fused=args.compile, **options)
        return Reply({"model": args.name, "out": str(folder), "seed": args.seed}, f"connector and LoRA are in {folder}")
    options["fused"] = args.compile
    if args.name == "smol":
        from llava_lab.training.smol.make import SMOL, train_smol

        folder, what = train_smol(args.out, recipe=replace(SMOL, seed=args.seed), **options), "connector and LoRA are"
    else:
        from llava_lab.training import train as run_recipe

        folder, what = run_recipe(args.name, args.out, seed=args.seed, **options), "the model is"
    return Reply({"model": args.name, "out": str(folder), "seed": args.seed}, f"{what} in {folder}")


def _train_stage(args: argparse.Namespace) -> Reply:
    import llava_lab as ll
    from llava_lab.training.stages import Running, train_stage

    stages = args.stage or []
    if len(stages) != 1:
        raise OptionError(f"--data trains one stage at a time: --stage align or --stage instruct, got {stages or 'none'}")
    recipe, sources = _read_recipe(args, stages[0]), [read_source(text) for text in args.data]
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    lab = ll.load(args.model or "tiny", device="cpu" if several else args.device, dtype=args.dtype)  # each process moves its own
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
        recipe=recipe,
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
    if done.stopped == "diverged":
        kept = f"{done.folder} is the last good checkpoint" if done.folder else "there is no checkpoint before it"
        raise LabError(
            f"training diverged after step {done.steps} of {done.of}, {kept}; train with a lower rate in another folder"
        )
    data["loss"] = done.losses[-1] if done.losses else None
    text = f"{done.stopped} at step {done.steps} of {done.of}; the model is in {done.folder}"
    text = "\n".join([text, *(f"skipped {line}" for line in done.skipped)])
    return Reply(data, text, code=130 if done.stopped == "interrupted" else 0)


def read_source(text: str) -> Any:
    """``mix.json,weight=0.5,suffix=word,images=photos`` as a `Source`. Raises OptionError for another name."""
    from llava_lab.training.rows import Source

    file, *pairs = text.split(",")
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in ("weight", "suffix", "images"):
            raise OptionError(f"--data wants FILE[,weight=W][,suffix=NAME][,images=DIR], got {pair!r}")
        options[name] = value
    if "weight" in options:
        try:
            options["weight"] = float(options["weight"])
        except ValueError:
            raise OptionError(f"--data's weight must be a number, got {options['weight']!r}") from None
    return Source(file, **options)


def _read_recipe(args: argparse.Namespace, stage: str) -> Any:
    from llava_lab.training.recipe import LLAVA_RECIPES

    if stage not in ("align", "instruct"):
        raise OptionError(f"--stage must be align or instruct, got {stage!r}")
    recipe = LLAVA_RECIPES[args.recipe]
    if args.lora and (stage != "instruct" or recipe.instruct_lora is None):
        raise OptionError("--lora goes with --stage instruct of the recipe llava-1.5-7b")
    chosen: Any = recipe.instruct_lora if args.lora else recipe.stage(stage)
    names = ("rate", "batch", "epochs", "connector_rate", "fit")
    return replace(chosen, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def ablate(args: argparse.Namespace) -> Reply:
    import llava_lab as ll

    # what was not given is left to the function's own defaults
    options: dict[str, Any] = {"rates": _read_rates(args.rates)} if args.rates else {}
    if args.connector:
        options["connectors"] = args.connector
    if args.budget != "both":
        options["budgets"] = (args.budget,)
    result = ll.compare_connectors(
        data=args.data,
        pictures=args.pictures,
        test_pictures=args.test_pictures,
        start=args.start or args.model,
        language=args.language,
        out=args.out,
        seeds=args.seeds,
        stage1=STAGES[args.stage1],
        steps_scale=args.steps_scale,
        validation=args.validation,
        test=args.test,
        keep=not args.no_keep,
        fused=args.compile,
        seed=args.seed,
        **options,
    )
    common.save(result, args.save)
    return Reply(result.to_dict(), str(result.table()))


def _read_rates(text: str) -> tuple[float, ...]:
    """``3e-4,1e-3,3e-3`` as numbers. Raises OptionError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--rates wants numbers with commas between them, got {text!r}") from None


def convert(args: argparse.Namespace) -> Reply:
    """Convert, and say what was written."""
    from llava_lab.models.convert import convert as write

    made = write(args.folder, args.out, vision=args.vision, base=args.base)
    return Reply({**asdict(made), "folder": str(made.folder)}, f"wrote {made.folder}\nfrom {made.source}")


def data(args: argparse.Namespace) -> Reply:
    from llava_lab.worlds.picturebook import write_dataset

    file = common.write(lambda out: write_dataset(out, n=args.n, seed=args.seed, split=args.split), args.out)
    return Reply({"data": args.world, "file": str(file), "n": args.n, "split": args.split, "seed": args.seed}, f"wrote {file}")
