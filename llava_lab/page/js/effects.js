// @ts-check
/**
 * What the answer owes to the selected patches, measured while the reader selects: each word's probability when the answer may not
 * attend to them, when they are covered, and both again with as many random patches; and what one patch would say at every state.
 */

import { button, make, section, setText } from "../../../widgets/js/shared/dom.js";
import { patchName } from "../../../widgets/js/shared/grid.js";
import { formatPercent } from "../../../widgets/js/shared/maps.js";
import { sumOf } from "./rollout.js";
import { seeded } from "./views.js";

/**
 * @typedef {import("./engine.js").Engine} Engine
 * @typedef {import("./engine.js").Answer} Answer
 * @typedef {import("./tokenizer.js").AnswerWord} AnswerWord
 */

const DRAWS = 3; // of random patches, whose mean is the control
const QUIET = 150; // milliseconds without a change before anything is measured
const LIKELIEST = 3; // words a state
const COLUMNS = ["as it was", "cut off", "random", "covered", "random"];
const SAID = [
  "Probability of each word of the same answer. Cut off: the answer may not attend to the selected patches, in any layer.",
  `Covered: mid-grey in their place, before anything sees them. Random: as many other patches, mean of ${DRAWS} draws: what is not`,
  "below it says nothing about these patches.",
].join(" ");

export class Effects {
  /** @param {Engine} engine @param {Answer} answer @param {AnswerWord[]} words @param {AbortSignal} signal */
  constructor(engine, answer, words, signal) {
    this.engine = engine;
    this.answer = answer;
    this.words = words;
    this.signal = signal;
    this.asked = 0;
    this.state = make("p", "lab-caption", ["Select patches in the picture above: press one, or drag over several."], { "aria-live": "polite" });
    this.table = make("table", "lab-numbers");
    this.root = section("What if the answer could not see them", [this.state, make("div", "lab-wide", [this.table], { tabindex: "0", role: "group", "aria-label": "Probabilities by word" }), make("p", "lab-caption", [SAID])]);
    this.show([], []);
  }

  /** @param {number[]} patches */
  async measure(patches) {
    const asked = ++this.asked;
    const late = () => asked !== this.asked || this.signal.aborted;
    if (!patches.length) {
      setText(this.state, "Select patches in the picture above: press one, or drag over several.");
      return this.show([], []);
    }
    setText(this.state, `Measuring ${patches.length === 1 ? "1 patch" : `${patches.length} patches`}…`);
    await new Promise((done) => setTimeout(done, QUIET));
    const all = this.answer.image[1] - this.answer.image[0];
    const columns = /** @type {number[][][]} */ ([[this.answer.logprobs]]);
    const draws = randomDraws(all, patches, DRAWS);
    for (const way of /** @type {("knockedOut" | "occluded")[]} */ (["knockedOut", "occluded"])) {
      for (const some of [[patches], draws]) {
        const column = /** @type {number[][]} */ ([]);
        columns.push(column);
        for (const one of some) {
          if (late()) return;
          column.push(await this.engine[way](this.answer, one));
          if (!late()) this.show(columns, patches);
        }
      }
    }
    if (!late()) setText(this.state, `${patches.length === 1 ? "1 patch" : `${patches.length} patches`} of ${all}.`);
  }

  /** @param {number[][][]} columns measured so far: draws of log-probabilities by token @param {number[]} patches */
  show(columns, patches) {
    const rows = [...this.words, { text: "whole answer", start: 0, stop: this.answer.logprobs.length }];
    const chance = (/** @type {number[][] | undefined} */ draws, /** @type {AnswerWord} */ word) =>
      draws?.length ? draws.reduce((sum, some) => sum + Math.exp(sumOf(some, word.start, word.stop)), 0) / draws.length : null;
    const head = make("tr", "", [make("th", "", ["word"], { scope: "col" }), ...COLUMNS.map((name) => make("th", "", [name], { scope: "col" }))]);
    const body = rows.map((word) => {
      const before = chance([this.answer.logprobs], word) ?? 1;
      const cells = COLUMNS.map((_, i) => {
        const p = i === 0 ? before : chance(columns[i], word);
        const lost = p !== null && i > 0 && p < before - 0.1;
        return make("td", lost ? "lab-lost" : "", [p === null ? (patches.length ? "…" : "–") : formatPercent(p)]);
      });
      return make("tr", "", [make("th", "", [word.text], { scope: "row" }), ...cells]);
    });
    this.table.replaceChildren(make("thead", "", [head]), make("tbody", "", body));
  }
}

/** Sets of as many other patches, the same for the same selection. @param {number} all @param {number[]} patches @param {number} count */
export function randomDraws(all, patches, count) {
  const taken = new Set(patches);
  const free = Array.from({ length: all }, (_, i) => i).filter((patch) => !taken.has(patch));
  const random = seeded(patches.reduce((sum, patch) => (31 * sum + patch + 1) >>> 0, 7));
  return Array.from({ length: free.length >= patches.length ? count : 0 }, () => {
    const pool = [...free];
    return patches.map(() => pool.splice(Math.floor(random() * pool.length), 1)[0]);
  });
}

export class LensView {
  /** @param {Engine} engine @param {Answer} answer @param {(id: number) => string} piece @param {import("../../../widgets/js/shared/grid.js").PictureMap} map */
  constructor(engine, answer, piece, map) {
    this.engine = engine;
    this.answer = answer;
    this.piece = piece;
    this.map = map;
    this.patch = -1;
    this.busy = false;
    this.place = make("p", "lab-caption", ["Point at a patch to read it."]);
    this.list = make("table", "lab-numbers lab-lens-list");
    const about = "The likeliest words if the model stopped there (logit lens): state 0 is what the connector gives. That a word can be read does not say that the model uses it.";
    this.root = section("What one patch would say", [this.place, this.list, make("p", "lab-caption", [about])]);
  }

  /** @param {number} patch */
  async show(patch) {
    if (patch < 0 || patch === this.patch) return;
    this.patch = patch;
    if (this.busy) return; // the one under way sees to it
    this.busy = true;
    let shown = -1;
    while (shown !== this.patch) {
      shown = this.patch;
      const rows = await this.engine.lens(this.answer, this.answer.image[0] + shown, LIKELIEST);
      setText(this.place, patchName(this.map, shown));
      const head = make("tr", "", ["state", "likeliest", "then", "then"].map((name) => make("th", "", [name], { scope: "col" })));
      const body = rows.map((tokens, state) => make("tr", "", [make("th", "", [String(state)], { scope: "row" }), ...tokens.map((token) => this.cell(token))]));
      this.list.replaceChildren(make("thead", "", [head]), make("tbody", "", body));
    }
    this.busy = false;
  }

  /** @param {{id: number, p: number}} token */
  cell({ id, p }) {
    return make("td", "", [make("span", "lab-lens-word", [this.piece(id).trim() || "␣"]), " ", make("span", "lab-lens-p", [formatPercent(p)])]);
  }
}

/** Every patch in turn, for a map of its own. @param {number} patches @param {(patch: number) => Promise<number[]>} measure
 * @param {(done: number) => boolean} step says how far it is; false ends it @returns {Promise<number[][] | null>} */
export async function sweep(patches, measure, step) {
  const rows = [];
  for (let patch = 0; patch < patches; patch++) {
    if (!step(patch)) return null;
    rows.push(await measure(patch));
  }
  return rows;
}

/** The two maps that cost a pass for each patch. @param {(name: string) => void} start @param {AbortSignal} signal */
export function sweepBar(start, signal) {
  const state = make("span", "lab-caption", [], { "aria-live": "polite" });
  const names = { token_knockout: "Cut off each patch", occlusion: "Cover each patch" };
  const buttons = Object.entries(names).map(([name, text]) => button(text, () => start(name), signal));
  const root = make("div", "lab-bar-row", [make("span", "lab-label", ["More maps"]), ...buttons, state]);
  return { root, buttons, state, names: Object.keys(names) };
}

