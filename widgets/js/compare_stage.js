// @ts-check
/**
 * What is read of the enlarged map: what made it, its scores beside those of the other methods, its likes.
 * Builds its elements once; `update` writes what changed.
 */

import { alikeText, formatScore, scoreOf } from "./compare_view.js";
import { make, section, setText } from "./dom.js";

/**
 * @typedef {import("./compare_view.js").CompareSpec} CompareSpec
 * @typedef {import("./compare_view.js").Tile} Tile
 * @typedef {{tiles: Tile[], stage: number}} StageView
 */

const KEY = "Bars are this map's scores, ticks the other methods', rings the controls'.";

/** Name, verdict, what made it, notes.
 * @param {CompareSpec} spec */
export function aboutMap(spec) {
  const name = make("h3", "lab-stage-name");
  const verdict = make("span", "lab-stage-verdict");
  const caption = make("p", "lab-caption");
  const alike = make("p", "lab-caption");
  const notes = make("ul", "lab-notes");
  let last = "";
  return {
    root: make("section", "lab-section", [make("div", "lab-stage-head", [name, verdict]), caption, notes, alike]),
    /** @param {StageView} view */
    update({ tiles, stage }) {
      const { method, target } = tiles[stage];
      const key = `${stage} ${target}`;
      if (key === last) return;
      last = key;
      setText(name, method.name);
      setText(verdict, verdictOf(tiles[stage]));
      setText(caption, method.caption);
      notes.replaceChildren(...method.notes.map((text) => make("li", "", [text])));
      setText(alike, alikeText(spec, stage));
    },
  };
}

/** @param {Tile} tile */
function verdictOf({ method, target, doubt }) {
  if (method.control) return "control";
  if (doubt) return "not shown to beat random";
  return target >= 0 && method.beats[target] ? "beats random" : "";
}

/** Each score of the enlarged map on a line from the lowest to the highest of all methods, with the others as ticks.
 * @param {CompareSpec} spec */
export function scoreLines(spec) {
  const rows = spec.scores.map((score) => {
    const line = make("span", "lab-score-line", [], { "aria-hidden": "true" });
    const value = make("span", "lab-score-value");
    const name = make("span", "lab-score-name", [score.name]);
    const better = make("span", "lab-score-better", [score.lower ? "lower is better" : ""]);
    return { score, line, value, root: make("li", "lab-score", [make("span", "lab-score-label", [name, better]), line, value]) };
  });
  const groups = [...new Set(spec.scores.map(({ group }) => group))].map((group) => {
    const own = rows.filter((row) => row.score.group === group).map((row) => row.root);
    return section(group || "Scores", [make("ul", "lab-scores", own)]);
  });
  let last = "";
  return {
    root: make("div", "lab-score-groups", rows.length ? [...groups, make("p", "lab-caption", [KEY])] : []),
    /** @param {StageView} view */
    update({ tiles, stage }) {
      const key = tiles.map((tile) => tile.target).join() + ` ${stage}`;
      if (key === last) return;
      last = key;
      for (const row of rows) {
        const values = tiles.map((tile) => scoreOf(spec, tile, row.score.name, stage));
        setText(row.value, formatScore(values[stage]));
        row.line.replaceChildren(...ticks(spec, values, stage));
      }
    },
  };
}

/** @param {CompareSpec} spec @param {(number | null)[]} values @param {number} stage */
function ticks(spec, values, stage) {
  const known = values.filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const order = values.map((_, i) => i).sort((a, b) => Number(a === stage) - Number(b === stage)); // its own on top
  return order.flatMap((i) => {
    const value = values[i];
    if (value === null) return [];
    const kind = i === stage ? "lab-tick lab-tick-own" : spec.methods[i].control ? "lab-tick lab-tick-control" : "lab-tick";
    const tick = make("span", kind);
    tick.style.left = `${high > low ? (100 * (value - low)) / (high - low) : 50}%`;
    return [tick];
  });
}
