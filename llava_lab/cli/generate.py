"""The commands around instruction rows: generate, check-pays.

    llava-lab generate --world picturebook --n 500 --teacher rules --out data
    llava-lab generate --captions captions_train2014.json --instances instances_train2014.json \\
        --teacher http://127.0.0.1:8080/v1 --name qwen3-8b --max-requests 2000 --out data
    llava-lab generate --check llava_instruct_150k.json --instances instances_train2014.json --out work
    llava-lab generate --photos holiday --teacher smol --kinds detail --out data

The same command, started again or several times at once, goes on where the others are. What it will ask for at most is said
on standard error before it starts. ``check-pays`` trains on rows with and without the truth check and says whether it helps.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llava_lab.cli import common
from llava_lab.cli.common import Add, Reply, positive, say
from llava_lab.errors import OptionError

RULES = "rules"


def add_commands(add: Add) -> None:
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

    result = instructions.check_pays(
        lie=args.lie,
        n=args.n,
        seeds=args.seeds,
        steps=args.steps,
        batch=args.batch,
        arms=[name.strip() for name in args.arms.split(",")],
        kinds=[name.strip() for name in args.kinds.split(",")],
        start=args.start or args.model,
        test=args.test,
        out=args.out,
        seed=args.seed,
    )
    common.save(result, args.save)
    return Reply(result.to_dict(), str(result.table()))


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
    options: dict[str, Any] = {"price": _price(args.price), "terms": args.terms, "key_variable": args.key_variable} | warm
    return ServerTeacher(args.name, args.teacher, max_requests=args.max_requests, parallel=args.parallel, **options)


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--price wants two numbers, per million tokens read and written, got {text!r}") from None
    return read, written
