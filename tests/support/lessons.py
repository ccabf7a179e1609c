"""What each lesson's tests ask of its variables after its last cell, and a run of a lesson with that question at its end."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from tests import execute

SECONDS = 480  # the promise is 60 to 90 on two free cores; here a lesson has one thread, and the other core is busy
TRY = """
import json as _json

def _try(given, check):
    try:
        return check(given)
    except AssertionError as error:
        return f"refused: {error}"

_CAR = [(row, col) for row in (8, 9, 10) for col in (3, 4, 5, 6, 7)]
"""
# What is asked of each lesson's own variables after its last cell; a dict that JSON can hold.
PROBES = {
    "00_start_here": TRY
    + """
print(_json.dumps({
    "answer": run.answer,
    "relevance": [relevance.method, relevance.targets[0].text, list(relevance.grid)],
    "widths": [features.shape[-1], tokens.shape[-1]],
    "asked again": ask_again(_CAR).answer,
    "without the strongest": {
        name: ask_again([(row, column) for row, column, _ in map_.top(16, target=red)]).answer for name, map_ in maps.items()
    },
    "wide": [lab.ask("images/wide-street.png", "Is there a red car?", fit=fit).answer for fit in ("pad", "crop")],
    "middle": [_try((9, 5), check_middle), _try((5, 9), check_middle)],
    "cover": [_try(patches, check_cover) for patches in (_CAR, [(0, 0)], [(row, col) for row in range(12) for col in range(12)])],
}))
""",
    "01_attention_rollout": TRY
    + """
def _right(attentions, residual):
    total = np.eye(len(attentions[0]))
    for attention in attentions:
        total = ((1 - residual) * attention + residual * np.eye(len(total))) @ total
    return total

def _reversed(attentions, residual):
    return _right(attentions[::-1], residual)

def _swapped(attentions, residual):
    return _right(attentions, 1 - residual)

_depth = next(n for n in range(1, 40) if np.linalg.matrix_power(half_uniform, n)[predicting, 0] > 0.5)
print(_json.dumps({
    "answer": run.answer,
    "mean": {name: list(map(float, parts)) for name, parts in mean.items()},
    "agree": float(agree),
    "questions": len(shares["random"]),
    "rollout": [_try(yours, check_rollout) for yours in (_right, _reversed, _swapped)],
    "depth": [_try(depth, check_depth) for depth in (_depth, _depth - 1, _depth + 1)],
}))
""",
    "02_patch_influence": TRY
    + """
def _alone(top, start):
    alone = grey[None, :, None, None].expand_as(pixels).clone()
    block = np.s_[:, :, top * side : (top + 3) * side, start * side : (start + 3) * side]
    alone[block] = pixels[block]
    return log_probability(alone)

print(_json.dumps({
    "answer": run.answer,
    "said": said,
    "left": left,
    "strongest": {name: [float(abs(rel.values[0]).max()), float(abs(rel.values[1]).max())] for name, rel in taken.items()},
    "flow by row": everything["attention_flow"].values[0].mean(1).tolist(),
    "looked": {text: float(share.mass["attention"]) for text, share in zip(spoken, shares, strict=True)},
    "needed": {text: float(share.kl[0].sum()) for text, share in zip(spoken, shares, strict=True)},
    "methods": sorted(everything),
    "not only from the picture": [parts["image"], own],
    "keep": [_try(_alone, check_keep), _try(lambda top, start: whole - by_hand.max(), check_keep),
             _try(lambda top, start: by_hand.max(), check_keep)],
    "deaf": [_try(names, check_deaf) for names in (("logit_lens_map", "vision", "edges"), ("edges",), ("attention",))],
}))
""",
    "03_which_map_to_trust": TRY
    + """
def _area(steps, down, up):
    gap = up - down
    return float(((gap[1:] + gap[:-1]) / 2 * np.diff(steps)).sum())

_under = {name: float(np.trapezoid(fall, taken)) for name, fall in falls.items()}
print(_json.dumps({
    "answer": run.answer,
    "under": _under,
    "under by chance": [float(np.trapezoid(fall, taken)) for fall in chance],
    "beats random": bool(score.beats_random[0]),
    "needed and marked": [int(needs.argmax()), int(marks.argmax()), car],
    "sanity": {check.method: check.verdict for check in checks},
    "after another question": {check.method: float(check.question_spearman.min()) for check in checks},
    "greyed": list(result.greyed()),
    "at odds": [len(missed), len(pretty), len(pairs), len(nobody)],
    "least alike": float(pairs[0][0]) if pairs else 1.0,
    "absent": [[said.answer, bool(np.isnan(found.faithfulness["edges"].gain[0]))] for said, found in nobody],
    "panels": len(panels),
    "board": [board.about["fingerprint"] == lab.fingerprint, sorted(board.methods)],
    "gain": [_try(yours, check_gain) for yours in (
        _area, lambda *given: -_area(*given), lambda steps, down, up: (up - down).mean(), lambda *given: 2.0)],
    "sees": [_try(name, check_sees) for name in ("vision", "edges", "relevancy")],
}))
""",
    "04_projector_tokens": TRY
    + """
def _nearest(tokens, words, mean=(True, True), unit=True):
    tokens, words = tokens - mean[0] * tokens.mean(0), words - mean[1] * words.mean(0)
    return (tokens @ (words / (np.linalg.norm(words, axis=1, keepdims=True) if unit else 1)).T).argmax(1)

print(_json.dumps({
    "answer": run.answer,
    "nearest to the car": [word.strip() for word, _ in near.at(*places["the car"])[:3]],
    "common": [float(common), float(near.common_direction)],
    "raw as before": float((nearest(tokens, bent, False) == nearest(tokens, embeddings, False)).float().mean()),
    "centred as before": float((nearest(tokens, bent, True) == nearest(tokens, embeddings, True)).float().mean()),
    "readable": {f"{space} {way}": [one.readable_share, float(one.random_shares.min()), float(one.random_shares.max())]
                 for (space, way), one in looks.items()},
    "left edge": [near.at(row, 0)[0][0].strip() for row in range(lab.grid[0])],
    "right": {f"{space} {what} {whose}": float(share) for space, found in right.items()
              for (what, whose), share in found.items()},
    "changed": float(changed),
    "lenses": {f"{name} {what} {whose}": share.tolist() for name, found in top_five.items()
               for (what, whose), share in found.items()},
    "highest": {f"{word} {state}": float(active.values[active.words.index(word), state].max())
                for word in active.words for state in (4, 6)},
    "beats": {name: [one.auc, one.low, one.high] for name, one in beats.items()},
    "verdicts": {label: [one.verdict("before", "after"), one.verdict("after", "layer 6")] for label, one in scores.items()},
    "ceiling": float(scores["kind"].accuracy[:2].min()),
    "cka": [float(one[a, b]) for one in (cloud.cka, cloud.control_cka) for a, b in ((0, 1), (1, 2))],
    "rank": [cloud.measure("effective rank", control=control).tolist() for control in (False, True)],
    "position": [cloud.measure("position", control=control).tolist() for control in (False, True)],
    "far": [[float(far[on_things].mean()), float(far[~on_things].mean())] for far in cloud.sinks[:3]],
    "nearest": [_try(yours, check_nearest) for yours in (
        _nearest, lambda *given: _nearest(*given, mean=(False, True)), lambda *given: _nearest(*given, unit=False))],
    "lost": [_try(given, lambda given: check_lost(*given)) for given in (
        ("row", "after", "layer 6"), ("kind", "before", "after"), ("row", "layer 6", "after"))],
}))
""",
    "05_interventions": TRY
    + """
def _stays(layer):
    with ll.ablated(lab, run, car, fill="drop", at=layer):
        return says_the_same(run)

_least = next(layer for layer in range(len(layers)) if _stays(layer))
_mean, _low, _high = plots.mean_sweep(sweeps)
print(_json.dumps({
    "answer": run.answer,
    "said": said,
    "trap": [[float((logits - plain).abs().max()), left] for logits, left in trap.values()],
    "fills": {name: [float(one.change[0]), float(one.control.min()), one.answer_after] for name, one in fills.items()},
    "cuts": {name: [float(one.change[0]), one.proof["largest"], one.answer_after] for name, one in cuts.items()},
    "brought back": {name: values.tolist() for name, values in zip(grid.sites, grid.values[0, ..., 1])},
    "pushed": {name: [float(one.change[0]), float(one.control.min()), one.answer_after, one.side["after"]]
               for name, one in pushed.items()},
    "before": pushed["erase"].side["before"],
    "rates": [list(rates.deciding_interval), list(rates.random_interval)],
    "asked": len(asked),
    "two": {name: list(map(float, share)) for name, share in stays.items()},
    "four": dict(zip(sweep.flows, _mean.tolist())),
    "ratio": ratio.tolist(),
    "dropped": {name: [float(share[0]) for share in shares] for name, shares in dropped.items()},
    "layer": [_try(layer, check_layer) for layer in (_least, _least - 1, _least + 1)],
    "relative": [_try(yours, check_relative) for yours in (
        lambda before, after: np.expm1(after - before), lambda before, after: after - before,
        lambda before, after: np.exp(after) - np.exp(before), lambda before, after: np.expm1(before - after))],
}))
""",
    "06_connector_ablation": TRY
    + """
_row = {stage1: result.row("mlp2x_gelu", "linear", budget="samples", stage1=stage1) for stage1 in (True, False)}
print(_json.dumps({
    "photos": {row["connector"]: row["by_type"] for row in photos.scores()},
    "photos told apart": {first: photos.row("mlp2x_gelu", first, type="naming")["verdict"] for first in (
        "linear", "closed_form", "linear2x", "bottleneck")},
    "photos at the edge": [one for one in photos.notes if "sweep's edge" in one],
    "r2": [fit.r2, dict(zip(fit.variants, fit.variant_r2.tolist()))],
    "flipped": {name: effect.row(name)["flipped"] for name in effect.variants},
    "local": [float(local.cosine.mean()), float(local.random_cosine.mean()), local.bent_share, local.straight_units],
    "by rank": {rank: one.run.answer for rank, one in ranks.items()},
    "foreign": [own["accuracy"], foreign["accuracy"], caught[0].category.__name__],
    "verdicts": [row["verdict"] for split in result.splits for row in result.rows(split=split)],
    "effect": [[_row[one]["effect"], *_row[one]["seed_interval"], _row[one]["mcnemar_p"]] for one in (True, False)],
    "first": [max(rows, key=lambda row: row["accuracy"])["connector"] for rows in (
        [row for row in result.scores() if row["stage1"] == stage1] for stage1 in (True, False))],
    "rates": sorted(set(result.rate.tolist())),
    "small": [small.row("mlp2x_gelu", "linear")["verdict"], len(small.seeds), list(small.notes)],
    "size": [_try((4198400, 5.0), lambda pair: check_size(*pair)), _try((4194304, 5.0), lambda pair: check_size(*pair)),
             _try((4198400, 4.0), lambda pair: check_size(*pair))],
    "width": [_try(width, check_width) for width in (0.67, 0.5959, 1.4898)],
}))
""",
    "07_train_two_stages": TRY
    + """
def _loss(log_p, ids, learn, before=1, mean=True, masked=True):
    surprise = -log_p[np.arange(len(ids) - before), ids[before:]]
    surprise = surprise[learn[before:]] if masked else surprise
    return surprise.mean() if mean else surprise.sum()

print(_json.dumps({
    "answers": {stage: [[one.answer, float(np.exp(one.logprobs.sum()))] for one in found] for stage, found in runs.items()},
    "trains": {part: [part in recipe.trains for recipe in recipes.values()] for part in parts},
    "moved": moved,
    "parameters": sum(sizes.values()) - sum(weight.numel() for weight in lab.model.parameters()),
    "all": {stage: [table["accuracy"], *table["interval"]] for stage, table in scores.items()},
    "types": {stage: {kind: [one["accuracy"], *one["interval"]] for kind, one in table["by_type"].items()}
              for stage, table in scores.items()},
    "blind": {kind: [one["accuracy"], *one["interval"]]
              for kind, one in {"all": scores["stage 2"]["controls"]["blind"],
                                **scores["stage 2"]["controls"]["blind"]["by_type"]}.items()},
    "losses": [first.losses, second.losses, float(np.log(len(lab.tokenizer)))],
    "ended": [first.stopped, second.stopped, plot.state],
    "inside": str(folder).startswith(kept.name),
    "count": [_try(count, check_count) for count in (49408, 49152, 49344, sizes["multi_modal_projector"])],
    "loss": [_try(yours, check_loss) for yours in (
        _loss, lambda *given: -_loss(*given), lambda *given: _loss(*given, masked=False),
        lambda *given: _loss(*given, mean=False), lambda *given: _loss(*given, before=0))],
}))
""",
    "08_real_models": TRY
    + """
def _on_car(found):
    values = np.clip(found.values[red], 0, None)
    return float(values[car].sum() / values.sum())

_gib = 7_063_427_072 * 2 / 2**30
print(_json.dumps({
    "answers": [run.answer for run in runs],
    "trained": sizes["connector"] / sum(sizes.values()),
    "words": len(lab.tokenizer),
    "score": [*score["interval"], score["controls"]["blind"]["interval"][1]],
    "on the car": {name: _on_car(found) for name, found in maps.items()} | {"by area": float(car.mean())},
    "named": {group: share.of(group, "either").tolist() for group in share.GROUPS},
    "perplexity": perplexity,
    "weights": [_try(gib, check_weights) for gib in (_gib, 8 * _gib, _gib / 2, _gib * 2**30 / 1e9)],
    "points": [_try(above, check_points) for above in (18, 30, 150)],
}))
""",
    "09_your_own_photograph": TRY
    + """
print(_json.dumps({
    "answer": run.answer,
    "patches": list(lab.grid),
    "told": {name: [said.answer, said.confidence] for name, said in told.items()},
    "asked again": again_said,
    "share": [_try(share, check_share) for share in (count / (lab.grid[0] * lab.grid[1]), 20, 144)],
}))
""",
    "10_instruction_data": TRY
    + """
print(_json.dumps({
    "boxes": len(context.boxes),
    "lies": {name: [false_sentences(question, answer, facts) for question, answer in rows] for name, rows in turns.items()},
    "rows": [result.rows for result in made.values()],
    "false": shares,
    "passing": [int(result.passing.sum()) for result in made.values()],
    "asked": asked,
    "exercise 1": [_try(yours, check_share) for yours in (
        lambda rate, n: 1 - (1 - rate) ** n, lambda rate, n: rate * n, lambda rate, n: rate**n, lambda rate, n: (1 - rate) ** n)],
}))
""",
    "11_hallucination": TRY
    + """
def _chair(named, there):
    return sum(len(words - truth) for words, truth in zip(named, there)) / sum(map(len, named))

def _mean(named, there):
    return np.mean([len(words - truth) / len(words) for words, truth in zip(named, there)])

print(_json.dumps({
    "vain": {grain: sorted(named(one.answer) - there) for grain, one in runs.items()},
    "sure": {grain: one.confidence for grain, one in runs.items()},
    "notes": grainy.notes[0],
    "said": said,
    "f1": [rows_of[f"F1 {name}"]["value"] for name in ("random", "popular", "adversarial")],
    "blind": {name: row["controls"]["blind"]["value"] for name, row in rows_of.items()},
    "commonest": counts[-1],
    "rarest": counts[0],
    "cuts": {name: [float(cut.change[0]), float(cut.control.min()), cut.answer_after] for name, cut in cuts.items()},
    "contrast": {name: first for name, first in chosen.items()},
    "against": trial["about"]["against"],
    "as it is": {row["measure"]: row["value"] for row in trial["measures"]},
    "exercise 1": [_try(yours, check_chair) for yours in (
        _chair, _mean, lambda n, t: np.mean([bool(a - b) for a, b in zip(n, t)]), lambda n, t: 1 - _chair(n, t))],
    "exercise 2": [_try(given, check_no) for given in ((50, 0), (50, 50), (0, 0))],
}))
""",
    "13_pruning": TRY
    + """
_truth = run.map.mask_to_patches(scene.masks()[car])
print(_json.dumps({
    "answer": run.answer,
    "places": [answer_with(inside), answer_with([patch for patch in patches if patch not in inside])],
    "without all it touches": answer_with([patch for patch in patches if list(patch) not in touched]),
    "by map": {
        name: [float(effect.change[0]), float(effect.control[:, 0].mean()), effect.answer_after] for name, effect in tried.items()
    },
    "scored": [tried["attention"].score, len(tried["attention"].noise_floor)],
    "combined": {name: effect.answer_after for name, effect in combined.items()},
    "accuracy": dict(zip(bench.rankings, bench.accuracy.tolist())),
    "told apart": {name: (low[n] > 0).tolist() for n, name in enumerate(bench.rankings)},
    "own": [len(own.pictures), list(own.rankings)],
    "rankings": [_try(given, check_ranking) for given in (_truth, -_truth, np.ones(lab.grid), np.ones((24, 24)))],
}))
""",
    "12_circuits_and_sinks": TRY
    + """
def _cmd(shares, kept):
    return np.trapezoid(1 - np.r_[0, kept], np.r_[0, shares])

print(_json.dumps({
    "answers": [run.answer, other.answer],
    "sinks": int(sinks.found.sum()),
    "attended": float(sinks.attended.mean()),
    "longest": float(sinks.length.max()),
    "head": [back - second, float(truth.heads[0, layer, 3]), first - second],
    "agreement": agreement,
    "estimate": [guess.passes["forward"], guess.passes["backward"], truth.passes["forward"]],
    "kept": dict(zip(map(str, found.shares.tolist()), found.faithfulness.mean(1).tolist())),
    "random": dict(zip(map(str, found.shares.tolist()), found.chance.mean((0, 2)).tolist())),
    "areas": [found.cpr, found.random_cpr, found.cmd, found.random_cmd],
    "edges": found.edges,
    "best": list(found.names[:10]),
    "one by one": found.agreement,
    "exchanged": [
        {name: dict(zip(result.ARMS, getattr(result, name)[row].tolist())) for name in ("iia", "alone")}
        for result, row in ((thing, 0), (thing, -1), (last, 0), (last, -1))
    ],
    "by hand": (base + (source - base) @ direction @ direction.T).tolist(),
    "share": [_try(one, check_share) for one in (0.02, 0.05, 0.01, 0.5)],
    "cmd": [_try(one, check_cmd) for one in (_cmd, lambda s, k: np.trapezoid(1 - k, s), lambda s, k: 1 - _cmd(s, k))],
}))
""",
}


@dataclass(frozen=True)
class Lesson:
    stored: nbformat.NotebookNode
    fresh: nbformat.NotebookNode
    found: dict[str, Any]
    seconds: float

    def check(self) -> None:
        """It is stored as it runs, may be stored, and takes no longer than a reader waits."""
        assert execute.differences(self.stored, self.fresh) == []
        assert execute.problems(self.fresh) == []
        assert self.seconds < SECONDS


def run(path: Path) -> Lesson:
    """The lesson as stored, run in a fresh kernel, with what its probe printed."""
    start = time.perf_counter()
    fresh, said = execute.execute(path, then=PROBES[path.stem])
    seconds = time.perf_counter() - start
    print(f"{path.stem}: {seconds:.0f} s with the kernel's start")
    return Lesson(nbformat.read(path, as_version=4), fresh, json.loads(said.splitlines()[-1]), seconds)
