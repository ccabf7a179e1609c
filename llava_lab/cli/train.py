"""The commands that make things: train, ablate, convert, data; instruction rows by generate, and check-pays.

    llava-lab train tiny --out runs/tiny
    llava-lab train smol --out runs/smol
    llava-lab train photo --pictures holiday --out runs/holiday
    llava-lab train --data captions.json --stage align --out runs/mine
    llava-lab train --data mix.json --stage instruct --model runs/mine/align/model --out runs/mine
    llava-lab ablate --start runs/tiny --out runs/ablation --save ablation.npz
    llava-lab ablate --data photos --pictures train --test-pictures everyday --stage1 with --budget samples --out runs/photos
    llava-lab convert FOLDER OUT
    llava-lab data picturebook --n 1000 --out book
    llava-lab generate --world picturebook --n 500 --teacher rules --out data
    llava-lab generate --captions captions_train2014.json --instances instances_train2014.json \\
        --teacher http://127.0.0.1:8080/v1 --name qwen3-8b --max-requests 2000 --out data
    llava-lab generate --check llava_instruct_150k.json --instances instances_train2014.json --out work
    llava-lab generate --photos holiday --teacher smol --kinds detail --out data

Under ``accelerate launch -m llava_lab.cli train ...`` the same command runs in every process. ``ablate`` trains connectors
side by side from the same start and says which of them answers better; the same command goes on where it was stopped.

``generate``, started again or several times at once, goes on where the others are. What it will ask for at most is said
on standard error before it starts. ``check-pays`` trains on rows with and without the truth check and says whether it helps.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import asdict, replace
from typing import Any

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, positive, say
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

    _add_generate(add)


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
    names = ("seed", "bf16", "device_batch", "checkpointing", "report_to", "save_every", "workers")
    running = Running(**{name: getattr(args, name) for name in names})
    options = {name: getattr(args, name) for name in ("steps", "resume", "skip_bad", "cut_long")}
    options["cache"] = False if args.no_cache else args.cache or True
    done = train_stage(lab, sources, stages[0], args.out, recipe=recipe, running=running, **options)
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
    named = ("data", "pictures", "test_pictures", "language", "out", "seeds", "steps_scale", "validation", "test", "seed")
    options |= {name: getattr(args, name) for name in named}
    options |= {"start": args.start or args.model, "stage1": STAGES[args.stage1]}
    return common.finished(args, ll.compare_connectors(keep=not args.no_keep, fused=args.compile, **options))


def _read_rates(text: str) -> tuple[float, ...]:
    """``3e-4,1e-3,3e-3`` as numbers. Raises OptionError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--rates wants numbers with commas between them, got {text!r}") from None


def convert(args: argparse.Namespace) -> Reply:
    """Convert, and say what was written."""
    from llava_lab.models.load import convert as write

    made = write(args.folder, args.out, vision=args.vision, base=args.base)
    return Reply({**asdict(made), "folder": str(made.folder)}, f"wrote {made.folder}\nfrom {made.source}")


def data(args: argparse.Namespace) -> Reply:
    from llava_lab.worlds.picturebook import write_dataset

    file = common.write(lambda out: write_dataset(out, n=args.n, seed=args.seed, split=args.split), args.out)
    return Reply({"data": args.world, "file": str(file), "n": args.n, "split": args.split, "seed": args.seed}, f"wrote {file}")


# -- generate, check-pays -------------------------------------------------------------------

RULES = "rules"


def _add_generate(add: Add) -> None:
    about = "make instruction rows from captions and boxes by a text-only teacher, and check them"
    command = add("generate", generate, about, "seed")
    where = command.add_argument_group("what the rows are about, one of")
    where.add_argument("--world", choices=("picturebook",), help="pictures of our own, drawn into --out")
    where.add_argument("--captions", metavar="FILE", help="COCO's captions_*.json")
    where.add_argument("--instances", metavar="FILE", help="COCO's instances_*.json, with the captions or alone")
    where.add_argument("--contexts", metavar="FILE", help="json lines: image, captions, boxes")
    where.add_argument("--photos", metavar="FOLDER", help="photographs with a .json or .txt beside each")
    command.add_argument("--n", type=positive, help="pictures, the first of them (default: all; a world: 100)")
    command.add_argument("--split", default="train", help="of a world (default: train)")
    command.add_argument(
        "--kinds", default="conversation,detail,reasoning", metavar="K,K", help="also: brief (default: %(default)s)"
    )
    command.add_argument("--kinds-from", metavar="FOLDER", help="edited kinds, a copy of llava_lab/instructions/kinds")
    command.add_argument(
        "--teacher", default=RULES, metavar="WHO", help="rules, an address http://.../v1, smol, a folder (default: rules)"
    )
    command.add_argument(
        "--lie", type=float, default=0.0, metavar="SHARE", help="rules: share of answers that are false (default: 0)"
    )
    command.add_argument("--name", help="an address: the model's name there")
    command.add_argument("--max-requests", type=positive, metavar="N", help="an address: all that may ever be sent")
    command.add_argument("--price", metavar="READ,WRITTEN", help="an address: per million tokens read, and written")
    command.add_argument("--key-variable", metavar="NAME", help="an address: environment variable of the key (OPENAI_API_KEY)")
    command.add_argument("--parallel", type=positive, default=4, metavar="N", help="an address: requests at once (default: 4)")
    command.add_argument("--temperature", type=float, help="of a model (default: 0.7 behind an address, 0 here)")
    command.add_argument("--terms", help="what the teacher's terms allow, for the data card")
    command.add_argument("--drop-false", action="store_true", help="leave out rows with a claim that the truth check finds false")
    command.add_argument("--estimate", action="store_true", help="say what it would ask for, and stop")
    command.add_argument("--check", metavar="FILE", help="make nothing: check rows that are there, in LLaVA's format")
    command.add_argument("--out", metavar="DIR", help="folder for rows, provenance, rejections and card")

    about = "train stage 2 on rows of a teacher that lies, checked and unchecked, and say whether the check pays"
    command = add("check-pays", check_pays, about, "model and seed")
    command.add_argument("--lie", type=float, default=0.3, metavar="SHARE", help="of answers that are false (default: 0.3)")
    command.add_argument("--n", type=positive, default=1500, help="pictures with rows (default: 1500)")
    command.add_argument("--seeds", type=positive, default=5, help="runs of each arm (default: 5)")
    command.add_argument("--steps", type=positive, default=100, help="of each run (default: 100)")
    command.add_argument("--batch", type=positive, default=12, help="rows in a step (default: 12)")
    command.add_argument("--test", type=positive, default=300, metavar="N", help="pictures asked about (default: 300)")
    command.add_argument("--kinds", default="conversation", metavar="K,K", help="of rows (default: conversation)")
    command.add_argument("--arms", default="all,passed,random,truthful", metavar="A,A", help="default: %(default)s")
    command.add_argument("--start", metavar="FOLDER", help="tower and language model (default: --model)")
    command.add_argument(
        "--out", required=True, metavar="DIR", help="folder for features and finished runs; goes on where it ends"
    )
    common.add_output(command, "--save", "keep the result in one .npz file")


def generate(args: argparse.Namespace) -> Reply:
    from llava_lab.instructions import check_rows, estimate_generation
    from llava_lab.instructions import generate as write

    if args.out is None and (not args.check or args.captions or args.instances):
        raise OptionError("generate wants --out, the folder to write to (with --check only where COCO's files are sorted)")
    teacher, contexts = read_teacher(args), read_contexts(args)
    if args.check:
        checked = check_rows(args.check, contexts)
        return Reply(checked.to_dict(), str(checked.table()))
    kinds = [name.strip() for name in args.kinds.split(",") if name.strip()]
    plan = estimate_generation(contexts, teacher, kinds, args.kinds_from)
    if args.estimate:
        return Reply({"requests": plan.requests, "read": plan.read, "written": plan.written, "cost": plan.cost}, str(plan))
    if args.teacher != RULES:
        say(str(plan), file=sys.stderr)
    result = common.write(
        lambda out: write(
            contexts, out, teacher=teacher, kinds=kinds, folder=args.kinds_from, drop_false=args.drop_false, seed=args.seed
        ),
        args.out,
    )
    return Reply(result.to_dict(), f"{result.table()}\nin {result.folder}")


def check_pays(args: argparse.Namespace) -> Reply:
    from llava_lab import instructions

    options = {name: getattr(args, name) for name in ("lie", "n", "seeds", "steps", "batch", "test", "out", "seed")}
    options |= {name: [part.strip() for part in getattr(args, name).split(",")] for name in ("arms", "kinds")}
    return common.finished(args, instructions.check_pays(start=args.start or args.model, **options))


def read_contexts(args: argparse.Namespace) -> Any:
    """The reader that the options name. Raises OptionError where they name none, or several."""
    from llava_lab.instructions import Coco, World, read_folder, read_jsonl

    coco = args.captions or args.instances
    given = [name for name, value in (("--world", args.world), ("--captions or --instances", coco), ("--contexts", args.contexts),
                                      ("--photos", args.photos)) if value]  # fmt: skip
    if len(given) != 1:
        said = "one of --world, --captions and --instances, --contexts, --photos"
        raise OptionError(f"generate wants {said}, got {' and '.join(given) or 'none'}")
    if args.world:
        return World(args.n or 100, args.split, args.seed)
    if coco:
        return Coco(f"{args.out}/work", captions=args.captions, instances=args.instances, n=args.n)
    return read_jsonl(args.contexts, n=args.n) if args.contexts else read_folder(args.photos, n=args.n)


def read_teacher(args: argparse.Namespace) -> Any:
    """The teacher that the options name. Raises OptionError for options of another one."""
    from llava_lab.instructions import LocalTeacher, RuleTeacher, ServerTeacher

    server = args.teacher.startswith(("http://", "https://"))
    for name in ("name", "max_requests", "price", "key_variable"):
        if getattr(args, name) is not None and not server:
            raise OptionError(f"--{name.replace('_', '-')} belongs to --teacher http://.../v1, got --teacher {args.teacher}")
    if args.lie and args.teacher != RULES:
        raise OptionError(f"--lie belongs to --teacher rules, got {args.teacher}")
    warm = {} if args.temperature is None else {"temperature": args.temperature}
    if args.teacher == RULES:
        return RuleTeacher(args.lie)
    if not server:
        return LocalTeacher(args.teacher, terms=args.terms, **warm)
    if args.name is None or args.max_requests is None:
        raise OptionError("--teacher with an address wants --name, the model's name there, and --max-requests, the budget")
    price = None if args.price is None else common.read_price(args.price)
    options: dict[str, Any] = {"price": price, "terms": args.terms, "key_variable": args.key_variable} | warm
    return ServerTeacher(args.name, args.teacher, max_requests=args.max_requests, parallel=args.parallel, **options)
