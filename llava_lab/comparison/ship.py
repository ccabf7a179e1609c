"""What ships of a comparison of connectors: its numbers, one small model of each of linear and MLP, and cards.

`ship_ablation` reads a finished comparison and trains nothing. It takes the first seed, with stage 1, at equal samples;
keeps it as a compact folder (`models.formats.compact`); and measures what keeping it so has changed, on test questions that the
result has answers to: a folder that answers otherwise than the result says is another run's, and is refused. The cards say what
was run, every arm's score, every verdict and the limits, from the result alone. Of a comparison on photographs `ship_photos`
writes the numbers and a card, and no model.

    ship_ablation("runs/ablation")  # writes llava_lab/assets/ablation
    ship_photos("runs/photos/ablation.npz")  # writes llava_lab/assets/ablation-photos
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_lab.comparison.photos import PHOTO_ABLATION, PhotoRecipe
from llava_lab.comparison.plan import ABLATION as RECIPE
from llava_lab.comparison.plan import BUDGETS
from llava_lab.comparison.run import Finished, Job
from llava_lab.errors import CheckpointError, DataError, OptionError
from llava_lab.evaluation import answer_all, load_items
from llava_lab.evaluation.items import PHOTOS
from llava_lab.models import Lab, folders, load
from llava_lab.models.card import weights_fingerprint
from llava_lab.models.folders import ABLATE
from llava_lab.models.formats import compact
from llava_lab.results import ALL, MANY, Ablation
from llava_lab.shipped import ABLATION, PHOTO_COMPARISON
from llava_lab.training.recipe import Recipe

CONNECTORS = ("linear", "mlp2x_gelu")  # whose first seed ships
SHIPPED_AS = {"linear": "tiny-linear", "mlp2x_gelu": "tiny-mlp"}
RESULT, CARD = "ablation.npz", "README.md"
LARGEST = 2_000_000  # bytes of the result
PICTURES = 25  # of the test split, four questions each
COMPARED = 8  # questions whose logits are compared
AGREE = 0.95  # share of answers on which a folder and the result must agree


@dataclass(frozen=True)
class Change:
    """What keeping a model as bytes did to it, beside the folder the run wrote. Logits are over whole finished sequences."""

    questions: int
    same: int  # answers that are the same word for word
    right_before: int
    right_after: int
    logit: float  # largest difference of any logit
    logit_rounded: float  # the same when the folder's weights are only rounded to bfloat16
    logit_spread: float  # standard deviation of the folder's logits
    of_result: int  # answers right or wrong as the result has them
    bytes: int  # of the small folder

    def in_words(self) -> str:
        return (
            f"{self.same} of {self.questions} answers are the same; right {self.right_before} before, {self.right_after} "
            f"after; largest change of a logit {self.logit:.3f} (rounding to bfloat16 alone: {self.logit_rounded:.3f}; "
            f"logits spread by {self.logit_spread:.2f}); {self.bytes / 1e6:.1f} MB"
        )


def ship_ablation(
    out: str | os.PathLike,
    assets: str | os.PathLike = ABLATION,
    *,
    result: Ablation | str | os.PathLike | None = None,
    start: str = "runs/tiny",
    pictures: int = PICTURES,
    progress: bool = True,
) -> dict[str, Change]:
    """Write folder `assets` (``linear/``, ``mlp2x_gelu/``, ``ablation.npz``, ``README.md``) of the comparison in folder `out`.

    `result` None is ``out/ablation.npz``. `start` is what card and result call the start, which there may be a path of one
    machine. `pictures` of the test split are answered before and after. Returns what the bytes changed, by connector.
    Everything is written beside `assets` first and then renamed; an older shipped comparison gives way only then.
    Raises DataError for a result that is missing, larger than 2 MB or of other models than the folders hold,
    CheckpointError for a folder that is missing, OptionError where `assets` holds something else.
    """
    out, assets = Path(out), Path(assets)
    if not isinstance(result, Ablation):
        path = Path(result) if result else out / RESULT
        if not path.is_file():
            raise DataError(f"{path} is missing; make it with: {ABLATE}")
        result = Ablation.load(path)
    _refuse_strange(assets)
    result = replace(result, model=start)
    jobs = {name: first_job(result, name) for name in CONNECTORS}
    for job in jobs.values():
        if not (out / "models" / job.id / "config.json").is_file():
            raise CheckpointError(f"{out / 'models' / job.id} is missing; run {ABLATE} without --no-keep")
    with folders.whole_folder(assets) as part:
        _save_small(result, part)
        changes = {}
        for name, job in jobs.items():
            write_compact(out / "models" / job.id, part / name)
            (part / name / CARD).write_text(of_model(result, job), encoding="utf-8")
            changes[name] = measure(out / "models" / job.id, part / name, result, name, pictures=pictures, progress=progress)
        words = {name: change.in_words() for name, change in changes.items()}
        run = out / "runs" / f"{jobs['linear'].id}.npz"
        fused = run.is_file() and bool(Finished.load(run).setup.get("fused"))
        (part / CARD).write_text(of_result(result, words, fused=fused), encoding="utf-8")
    return changes


def ship_photos(result: Ablation | str | os.PathLike, assets: str | os.PathLike = PHOTO_COMPARISON) -> Path:
    """Write folder `assets` (``ablation.npz``, ``README.md``) of a comparison on photographs; returns it.

    Nothing is trained and no photograph is opened. Written beside `assets` first and then renamed. Raises DataError for a result
    that is missing, of other data or larger than 2 MB, OptionError where `assets` holds something else.
    """
    assets = Path(assets)
    if not isinstance(result, Ablation):
        if not Path(result).is_file():
            raise DataError(f"{result} is missing; make it with: {photo_command(None)}")
        result = Ablation.load(result)
    if result.data != PHOTOS:
        raise DataError(f"a comparison on {PHOTOS} ships here, got one on {result.data}; use ship_ablation")
    _refuse_strange(assets)
    with folders.whole_folder(assets) as part:
        _save_small(result, part)
        (part / CARD).write_text(of_photos(result), encoding="utf-8")
    return assets


def _refuse_strange(assets: Path) -> None:
    if assets.exists() and any(assets.iterdir()) and not (assets / RESULT).is_file():
        raise OptionError(f"{assets} holds something that is not a shipped comparison; remove it or give another folder")


def _save_small(result: Ablation, folder: Path) -> None:
    size = result.save(folder / RESULT).stat().st_size
    if size > LARGEST:
        raise DataError(f"the result takes {size:,} bytes and at most {LARGEST:,} ship; test on fewer pictures")


def first_job(result: Ablation, connector: str) -> Job:
    """The run of a connector's first seed with stage 1 at equal samples. Raises OptionError when there is none."""
    arm = result.arm(connector, budget="samples", stage1=True)
    first, second = result.steps[arm].tolist()
    return Job(connector, float(result.rate[arm]), int(result.seeds[0]), (first, second), result.splits)


def measure(before: Path, after: Path, result: Ablation, connector: str, *, pictures: int, progress: bool = True) -> Change:
    """Both folders on the first questions of the result's first split. Raises DataError when `before` is not the result's."""
    old, new = load(before, device="cpu", dtype="float32"), load(after, device="cpu", dtype="float32")
    split = result.splits[0]
    items = load_items("picturebook", split=split, n=min(pictures, result.pictures[2]), seed=result.seed)
    as_said = result.right[result.arm(connector, budget="samples", stage1=True), 0, result.question_split == 0][: len(items)]
    first = answer_all(old, items, label=f"{connector} as trained", progress=progress)
    right = [answer == item.answer for answer, item in zip(first, items, strict=True)]
    agree = int((np.array(right) == as_said).sum())
    if agree < AGREE * len(items):
        raise DataError(
            f"{before} answers {agree} of {len(items)} {split} questions as the result says; it is of another run: "
            "give the result of this folder"
        )
    second = answer_all(new, items, label=f"{connector} as bytes", progress=progress)
    logit, rounded, spread = _logits(old, new, items[:: max(1, len(items) // COMPARED)][:COMPARED])
    return Change(
        questions=len(items),
        same=sum(a == b for a, b in zip(first, second, strict=True)),
        right_before=sum(right),
        right_after=sum(answer == item.answer for answer, item in zip(second, items, strict=True)),
        logit=logit,
        logit_rounded=rounded,
        logit_spread=spread,
        of_result=agree,
        bytes=sum(file.stat().st_size for file in after.iterdir()),
    )


@torch.inference_mode()
def _logits(old: Lab, new: Lab, items: Any) -> tuple[float, float, float]:
    """(largest change as bytes, largest change in bfloat16's rounding, spread) over the sequences `old` finishes."""
    rounded: Any = copy.deepcopy(old.model).to(torch.bfloat16).to(torch.float32)
    changes, roundings, spreads = [], [], []
    for item in items:
        given = old.inputs(old.ask(item.draw(), item.question))
        logits = old.model(**given).logits
        changes.append(float((new.model(**given).logits - logits).abs().max()))
        roundings.append(float((rounded(**given).logits - logits).abs().max()))
        spreads.append(float(logits.std()))
    return max(changes), max(roundings), float(np.mean(spreads))


# -- the cards -----------------------------------------------------------------------------

HEAD = """---
license: apache-2.0
language: en
base_model: tiny, its vision tower and its language model before it saw a picture
pipeline_tag: image-text-to-text
---
"""
LIMITS = (
    "One small model, one drawn world. What holds here may not hold for a 7B and photographs.",
    "The shipped models are one seed of five or more; scores are of all seeds. They are trained briefly, to compare "
    "connectors, and know less than `tiny`: use `tiny` to look at a good model and these to look at the difference.",
    "Accuracy is greedy exact match of the whole sentence.",
    "A verdict other than *not distinguishable* needs an adjusted p below 5% over seeds (paired t test, Holm within a "
    "budget and stage setting) and an interval over pictures on the same side of 0.",
)


def of_model(result: Ablation, job: Job) -> str:
    """The card of one shipped model."""
    arm = result.arm(job.connector, budget="samples", stage1=True)
    scores = [
        f"{split}: {_percent(right.mean())}"
        for number, split in enumerate(result.splits)
        if (right := result.right[arm, 0, result.question_split == number]).size
    ]
    stages = " and ".join(f"{steps} steps of stage {number}" for number, steps in enumerate(job.steps, 1))
    return (
        f"{HEAD}\n# tiny with connector {job.connector}, of the shipped comparison\n\n"
        f"Seed {job.seed}, peak rate {job.rate:g} (chosen on validation), {stages}. "
        f"{int(result.parameters[arm]):,} parameters in the connector. Right on {', '.join(scores)} as trained, before its "
        "matrices were kept as bytes.\n\n"
        f'`ll.load("{SHIPPED_AS.get(job.connector, job.connector)}")` reads it; the vision tower is `tiny`\'s. '
        "The card one folder up says how it was made and what may be concluded.\n\n## Licence\n\nApache-2.0.\n"
    )


def of_result(result: Ablation, changes: dict[str, str], *, fused: bool) -> str:
    """The card of the whole comparison; `changes` says what keeping models as bytes did to each."""
    parts = [
        HEAD,
        "# The connector, compared\n",
        f"{len(dict.fromkeys(result.connectors))} connectors before one language model, behind one frozen vision tower: "
        f"{', '.join(dict.fromkeys(result.connectors))}. Each has its own rate, chosen on validation; then "
        f"{len(result.seeds)} seeds ({', '.join(map(str, result.seeds))}), all on the same batches in the same order.\n",
        '`ll.shipped_ablation()` opens the numbers, `ll.load("tiny-linear")` and `ll.load("tiny-mlp")` the models of the '
        "first seed (with stage 1, equal samples).\n",
        "## How it was made\n",
        "".join(f"    {line}\n" for line in commands(result, fused=fused)),
        *_made(result),
        *_measured(result),
        "## What keeping the models as bytes changed\n",
        "Matrices are int8 with a scale per row, the tower is `tiny`'s (the run's own, rounded to bfloat16: the same bits). "
        f"Measured on questions of the {result.splits[0]} split, beside the folders as trained:\n",
        _bullets(f"{name}: {words}" for name, words in changes.items()),
        "## Limits\n",
        _bullets((*LIMITS, *result.notes)),
        "## Licence\n",
        "Apache-2.0. Pictures and text are drawn and written by this project; no other data or weights went in.\n",
    ]
    return "\n".join(parts)


def _measured(result: Ablation) -> list[str]:
    """Scores, verdicts and rates."""
    return [
        "## Scores\n",
        "Percent right; 95% intervals resample pictures; the spread is the standard deviation over seeds.\n",
        *(text for split in result.splits for text in (f"### {split}\n", _scores(result, split))),
        "## Verdicts\n",
        "The second minus the first, in points: the mean over seeds, its 95% interval over seeds (what a repetition would "
        "give) and over pictures (of these very models). How many seeds would find a true difference of so many points four "
        "times in five is counted from the spread over seeds, at the level after Holm's correction, and not from the difference "
        "seen.\n",
        *(text for split in result.splits for text in (f"### {split}\n", _verdicts(result, split))),
        "## The rates\n",
        "Validation loss, nats per labelled token; the chosen rate is bold.\n",
        _sweep(result),
    ]


PHOTO_HEAD = """---
license: apache-2.0
language: en
---
"""
PHOTO_LIMITS = (
    "One tower, one language model of 135 million parameters, a thousand photographs. What holds here may not hold for a 7B.",
    "The training is short: a few dozen steps of instruction tuning, in which the language model learns by adapters alone. Which "
    "connector would be ahead after longer training, these runs cannot say.",
    "Connectors with two layers start at what the tower's classifier knows (its rows are their hidden units), the linear one at "
    "the best line onto the same words. `linear2x` has the MLP's start, size and layers, and no bend.",
    "`closed_form` is also what `linear` comes to at a rate of 0. A rate between that and the smallest one swept was not tried.",
    "A verdict other than *not distinguishable* needs an adjusted p below 5% over seeds (paired t test, Holm within a "
    "budget and stage setting) and an interval over pictures on the same side of 0.",
)


def of_photos(result: Ablation) -> str:
    """The card of a comparison on photographs: what was run, scores by type of question, verdicts by type, rates, limits."""
    kinds = [text for name in result.types[1:] for text in (f"### {name}\n", _verdicts(result, result.splits[0], type=name))]
    parts = [
        PHOTO_HEAD,
        "# The connector, compared on photographs\n",
        f"{len(dict.fromkeys(result.connectors))} connectors between a tower that saw ImageNet and a language model that read "
        f"text, both as others made them: {', '.join(dict.fromkeys(result.connectors))}. `closed_form` is the best line, "
        "solved for and not trained. Each of the others has its own rate, chosen on training photographs in other cuts; then "
        f"{len(result.seeds)} seeds ({', '.join(map(str, result.seeds))}), all on the same batches in the same order.\n",
        '`ll.shipped_ablation(data="photos")` opens the numbers. No model of it ships.\n',
        "## How it was made\n",
        f"    {photo_command(result)}\n",
        *_made(result),
        *_measured(result),
        "## Verdicts by type of question\n",
        *kinds,
        "## Limits\n",
        _bullets((*PHOTO_LIMITS, *result.notes)),
        "## Licence\n",
        "Apache-2.0. The photographs are not part of this project; the numbers are.\n",
    ]
    return "\n".join(parts)


def photo_command(result: Ablation | None) -> str:
    """What made a result on photographs; None stands for the defaults."""
    line = f"llava-lab ablate --data {PHOTOS} --pictures train --test-pictures everyday --out runs/photos"
    options = "" if result is None else _options(result, PHOTO_ABLATION)
    return f"{line}{options} --save runs/photos/{RESULT}"


def _options(result: Ablation, recipe: Recipe | PhotoRecipe) -> str:
    """All of a comparison's options but what it trains on and where it writes; `recipe` is that data's own."""
    line = "".join(f" --connector {name}" for name in dict.fromkeys(result.connectors))
    line += f" --rates {','.join(f'{rate:g}' for rate in result.sweep_rates)} --seeds {len(result.seeds)}"
    stages = {bool(aligned) for aligned in result.stage1}
    line += f" --stage1 {'both' if len(stages) == 2 else 'with' if True in stages else 'without'}"
    line += f" --budget {'both' if set(result.budgets) == set(BUDGETS) else result.budgets[0]}"
    line += f" --validation {result.pictures[1]} --test {result.pictures[2]} --seed {result.seed}"
    scale = result.recipe["instruct"]["steps"] / recipe.instruct.steps
    return line + (f" --steps-scale {scale:g}" if scale != 1 else "")


def commands(result: Ablation, *, fused: bool) -> list[str]:
    """What made the result, and what made the shipped folder of it."""
    out = "runs/ablation"
    line = f"llava-lab ablate --start {result.model} --out {out}{_options(result, RECIPE)}{' --compile' if fused else ''}"
    ship = f"python -c \"from llava_lab.comparison.ship import ship_ablation as ship; ship('{out}')\""
    return [f"llava-lab train tiny --out {result.model}", f"{line} --save {out}/ablation.npz", ship]


def _made(result: Ablation) -> list[str]:
    train, validation, *tests = result.pictures
    splits = ", ".join(
        f"{count} of {split} ({int(result.questions[number, 0]):,} questions)"
        for number, (split, count) in enumerate(zip(result.splits, tests, strict=True))
    )
    starts = ", ".join(f"{name} {value}" for name, value in result.start.items())
    stages = [
        f"{name}: {stage['steps']} steps of {stage['batch']}"
        for name in ("align", "instruct")
        if (stage := result.recipe.get(name))
    ]
    return [
        f"Data: {result.data}, {train:,} training pictures, {validation} of validation (rates are chosen there and nowhere "
        f"else), tested on {splits}. Recipe {result.recipe.get('name', '')}: {'; '.join(stages)}. Equal samples gives every "
        "connector these steps; equal operations (flops) gives the cheaper ones as many more as cost the same. Every run "
        f"starts from the same weights (fingerprints: {starts}). All runs together took {result.seconds / 3600:.1f} hours.\n"
    ]


def _scores(result: Ablation, split: str) -> str:
    names = ("connector", "equal", "stage 1", "parameters", "rate", "steps", "right (95%)", "over seeds", *result.types[1:])
    rows = [
        (
            row["connector"],
            row["budget"],
            "yes" if row["stage1"] else "no",
            f"{row['parameters']:,}",
            f"{row['rate']:g}",
            "+".join(map(str, row["steps"])),
            f"**{_percent(row['accuracy'])}** ({_percent(row['interval'][0])} to {_percent(row['interval'][1])})",
            f"{100 * row['sd']:.1f}",
            *(_percent(value) for value in row["by_type"].values()),
        )
        for row in result.scores(split=split)
    ]
    return _table(names, rows)


def _verdicts(result: Ablation, split: str, type: str = ALL) -> str:  # noqa: A002
    names = ("second", "first", "points", "over seeds (95%)", "over pictures (95%)", "p, adjusted", "verdict", _told(result))
    rows = [
        (
            row["second"],
            row["first"],
            f"{100 * row['effect']:+.2f}",
            _span(row["seed_interval"]),
            _span(row["picture_interval"]),
            f"{row['p_adjusted']:.2g}",
            f"**{row['verdict']}**" if row["verdict"] in ("better", "worse") else row["verdict"],
            _seeds(row),
        )
        for row in result.rows(split=split, type=type)
    ]
    return _table(names, rows)


def _told(result: Ablation) -> str:
    return f"seeds to find {100 * result.stated:g} points" if result.stated else "seeds to tell"


def _seeds(row: Mapping[str, Any]) -> str:
    if row["seeds_needed"] <= row["seeds"]:
        return "these are enough"
    return f"{row['seeds_needed']:,.0f}" if row["seeds_needed"] <= MANY else f"more than {MANY:,}"


def _sweep(result: Ablation) -> str:
    rows = []
    for arm in range(len(result.connectors)):
        losses = zip(result.sweep_rates.tolist(), result.sweep_loss[arm].tolist(), strict=True)
        cells = [f"**{loss:.4f}**" if rate == result.rate[arm] else f"{loss:.4f}" for rate, loss in losses]
        rows.append((result.label(arm), *cells))
    return _table(("arm", *(f"{rate:g}" for rate in result.sweep_rates)), rows)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _span(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value == value else "-"


# -- compact folders ----------------------------------------------------------------------

LEVELS = 127  # of int8 on either side of 0; -128 is not used
SMALL_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "README.md"),
)


def write_compact(source: str | os.PathLike, out: str | os.PathLike, *, tower: str = compact.TOWER) -> Path:
    """Write the checkpoint in folder `source` as a compact folder `out`, and return its path.

    `tower` is the shipped model whose vision tower it shares: `source`'s, rounded to that one's dtype, must be it bit for
    bit. Written under another name first, so `out` is there whole or not at all. Raises CheckpointError for another tower
    or weights that are not finite, OptionError when `out` is there already.
    """
    out = Path(out)
    folder = folders.find(source).path
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OptionError(f"{out} is there already; remove it or give another folder")
    weights: dict[str, Tensor] = {}
    for file in folders.weight_files(folder):
        weights |= compact.read_tensors(file)[0]
    own = {name: value for name, value in weights.items() if name.startswith(compact.TOWERS)}
    shared = compact.tower_weights(tower)
    _same_tower(own, shared, folder, tower)
    metadata = {"format": "pt", "compact": compact.FORMAT, "tower": tower, "tower_fingerprint": weights_fingerprint(shared)}
    with folders.whole_folder(out) as part:
        for name in SMALL_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, part / name)
        save_file(pack({name: weights[name] for name in weights.keys() - own.keys()}), part / compact.FILE, metadata=metadata)
        (part / compact.FILE).chmod(0o644)
    return out


def pack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with their row scales, the rest in float32. Raises CheckpointError for what is not finite."""
    packed: dict[str, Tensor] = {}
    for name, value in weights.items():
        exact = value.detach().float()
        if not bool(torch.isfinite(exact).all()):
            raise CheckpointError(f"{name} holds numbers that are not finite; a diverged model cannot be kept as bytes")
        if exact.ndim != 2:
            packed[name] = exact.contiguous()
            continue
        scale = exact.abs().amax(1) / LEVELS
        steps = exact / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]  # a row of zeros stays one
        packed[name] = steps.round().clamp(-LEVELS, LEVELS).to(torch.int8)
        packed[name + compact.SCALE] = scale
    return packed


def _same_tower(own: Mapping[str, Tensor], shared: Mapping[str, Tensor], source: Path, name: str) -> None:
    """Refuse a tower that is not the shared one: names, shapes, fingerprint and every bit, after rounding to its dtype."""
    odd = sorted(set(own) ^ set(shared)) or [key for key in own if own[key].shape != shared[key].shape]
    rounded = {} if odd else {key: own[key].to(shared[key].dtype) for key in own}
    odd = odd or [key for key in rounded if not torch.equal(rounded[key], shared[key])]
    if not shared or odd or weights_fingerprint(rounded) != weights_fingerprint(shared):
        raise CheckpointError(
            f"the vision tower in {source} is not that of {name!r} ({len(odd)} of {len(shared)} weights differ, e.g. "
            f"{odd[0] if odd else 'none'}); only a model trained behind that frozen tower can leave it out"
        )
