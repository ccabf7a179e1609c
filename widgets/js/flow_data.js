// @ts-check
/**
 * What cutting and patching did, read from one buffer of exact scores, and the sentences that say it. NaN: not measured.
 * A change is the score after less the score before; a share is how much of clean less corrupt was brought back. Pure.
 */

import { ARROWS } from "./shared/gestures.js";
import { bytesOf, formatNumber, formatPercent } from "./shared/maps.js";

/**
 * @typedef {{flows: string[], windows: [number, number][], centres: number[], count: number, targets: number[],
 *   logodds: boolean, floors: number[], notes: string[]}} SweepSpec
 * @typedef {{components: string[], sites: string[], windows: [number, number][], count: number, targets: number[],
 *   corruption: string, floors: number[], answers: string[][][], clean: string, corrupt: string, notes: string[]}} GridSpec
 * @typedef {{text: string, kind: string, p: number | null, key: string, what: string, plain: boolean}} FlowTarget
 * @typedef {{question: string, answer: string, model: string, seed: number, chips: FlowTarget[],
 *   sweep: SweepSpec | null, grid: GridSpec | null, picture: string, diverging: string, colors: string[]}} FlowSpec
 * @typedef {{before: Float32Array, after: Float32Array, clean: Float32Array, corrupt: Float32Array,
 *   scores: Float32Array}} FlowData
 * @typedef {[number, number]} Spot row (flow or site), window
 * @typedef {{rows: number[][], before: number, after: number[][], floor: number}} Curves rows: what is drawn, flows x windows
 * @typedef {{rows: number[][], scores: number[][], clean: number, corrupt: number, whole: number, floor: number}} Cells
 */

const NOTHING = 1e-6; // of clean less corrupt: then there is nothing to bring back
const SMALL = 5e-4; // of a change that counts as none in a sentence

/** @param {DataView | Uint8Array} given @param {FlowSpec} spec @returns {FlowData} */
export function readFlow(given, { sweep, grid }) {
  const all = new Float32Array(bytesOf(given).slice().buffer); // a Float32Array must start on a multiple of four
  let at = 0;
  const take = (/** @type {number} */ count) => all.subarray(at, (at += count));
  const before = take(sweep ? sweep.count : 0);
  const after = take(sweep ? sweep.count * sweep.flows.length * sweep.windows.length : 0);
  const clean = take(grid ? grid.count : 0);
  const corrupt = take(grid ? grid.count : 0);
  return { before, after, clean, corrupt, scores: take(all.length - at) };
}

/** The curves of one target, or null where the sweep has none of it.
 * @param {FlowSpec} spec @param {FlowData} data @param {number} target @param {boolean} relative @returns {Curves | null} */
export function curvesOf({ sweep }, data, target, relative) {
  const own = sweep ? sweep.targets[target] : -1;
  if (!sweep || own < 0) return null;
  const wide = sweep.windows.length;
  const before = data.before[own];
  const after = sweep.flows.map((_, f) => sweep.windows.map((_, w) => data.after[(f * wide + w) * sweep.count + own]));
  const rise = (/** @type {number} */ score) =>
    sweep.logodds ? chanceOf(sweep, score) / chanceOf(sweep, before) - 1 : Math.expm1(score - before);
  const value = (/** @type {number} */ score) => (relative ? 100 * rise(score) : score - before);
  return { rows: after.map((row) => row.map(value)), before, after, floor: sweep.floors[own] };
}

/** The probability that a score stands for, of one token or from its logarithm. @param {SweepSpec} sweep @param {number} score */
export function chanceOf(sweep, score) {
  return sweep.logodds ? 1 / (1 + Math.exp(-score)) : Math.exp(score);
}

/** The cells of one target and component, or null where the grid has none of it.
 * @param {FlowSpec} spec @param {FlowData} data @param {number} target @param {number} component @returns {Cells | null} */
export function cellsOf({ grid }, data, target, component) {
  const own = grid ? grid.targets[target] : -1;
  if (!grid || own < 0) return null;
  const [tall, wide] = [grid.sites.length, grid.windows.length];
  const [clean, corrupt] = [data.clean[own], data.corrupt[own]];
  const whole = Math.abs(clean - corrupt) > NOTHING ? clean - corrupt : NaN;
  const score = (/** @type {number} */ s, /** @type {number} */ w) =>
    data.scores[((component * tall + s) * wide + w) * grid.count + own];
  const floor = grid.floors[own]; // what is below it came as nothing brought back
  const scores = grid.sites.map((_, s) => grid.windows.map((_, w) => score(s, w)));
  return { rows: scores.map((row) => row.map((one) => (one - corrupt) / whole)), scores, clean, corrupt, whole, floor };
}

/** @param {[number, number]} window layers [start, stop) */
export function layersText([start, stop]) {
  return stop - start === 1 ? `layer ${start}` : `layers ${start}–${stop - 1}`;
}

/** @param {string} flow */
export function flowText(flow) {
  return flow.replaceAll("->", "→");
}

/** A score or a change with as many decimals as a reader needs. @param {number} value */
export function scoreText(value) {
  if (!Number.isFinite(value)) return "–";
  return Math.abs(value) >= 100 ? formatNumber(value) : value.toFixed(2).replace(/^-0\.00$/, "0.00").replace("-", "−");
}

/** What one cut did, as a sentence.
 * @param {FlowSpec} spec @param {Curves} curves @param {Spot} spot @param {number} target */
export function cutSentence(spec, curves, [flow, window], target) {
  const sweep = /** @type {SweepSpec} */ (spec.sweep);
  const { what, plain } = spec.chips[target];
  const cut = `Cutting ${flowText(sweep.flows[flow])} in ${layersText(sweep.windows[window])}`;
  const after = curves.after[flow][window];
  if (!Number.isFinite(after)) return `${cut}: not measured.`;
  const change = after - curves.before;
  const range = `${scoreText(curves.before)} to ${scoreText(after)}`;
  if (change === 0 && curves.floor > 0) return `${cut} has a negligible effect on ${what}: less than the noise floor.`;
  if (Math.abs(change) < SMALL) return `${cut} leaves ${what} as it was, ${scoreText(curves.before)}.`;
  const [was, is] = [curves.before, after].map((score) => formatPercent(chanceOf(sweep, score)));
  const chance = plain ? `, the probability from ${was} to ${is}` : "";
  const size = Math.abs(change) < 0.005 ? "less than 0.01" : scoreText(Math.abs(change));
  return `${cut} ${change < 0 ? "lowers" : "raises"} ${what} by ${size}: from ${range}${chance}.`;
}

/** What one patched place brought back, as a sentence.
 * @param {FlowSpec} spec @param {Cells} cells @param {Spot} spot @param {number} target @param {number} component */
export function patchSentence(spec, cells, [site, window], target, component) {
  const grid = /** @type {GridSpec} */ (spec.grid);
  const put = `Clean ${grid.components[component]} at ${grid.sites[site]}, ${layersText(grid.windows[window])}`;
  const score = cells.scores[site][window];
  if (!Number.isFinite(score)) return `${put}: not measured.`;
  const { what } = spec.chips[target];
  if (!Number.isFinite(cells.whole)) return `${put}: corrupting did not change ${what}, so there is nothing to bring back.`;
  const ends = `${scoreText(cells.corrupt)} corrupted, ${scoreText(score)} patched, ${scoreText(cells.clean)} clean`;
  const negligible = score === cells.corrupt && cells.floor > 0;
  if (negligible) return `${put}, brings back a negligible part of what ${what} lost: less than the noise floor.`;
  return `${put}, brings back ${scoreText(cells.rows[site][window])} of what ${what} lost: ${ends}.`;
}

/** Round numbers that span a range, with zero among them where it lies inside.
 * @param {number} lo @param {number} hi @param {number} most */
export function niceTicks(lo, hi, most) {
  const rough = (hi - lo) / Math.max(1, most);
  if (!(rough > 0)) return [lo];
  const ten = 10 ** Math.floor(Math.log10(rough));
  const gap = ten * ([1, 2, 5, 10].find((step) => step * ten >= rough) ?? 10);
  const out = [];
  for (let i = Math.ceil(lo / gap - 1e-9); i * gap <= hi + 1e-9 * gap; i++) out.push(Number((i * gap).toPrecision(12)));
  return out;
}

/** The range the curves of some flows need: zero always, a little air. @param {number[][]} rows @returns {[number, number]} */
export function rangeWithZero(rows) {
  const known = rows.flat().filter(Number.isFinite);
  const [lo, hi] = [Math.min(0, ...known), Math.max(0, ...known)];
  const air = 0.08 * (hi - lo) || 1;
  return [lo - (lo < 0 || hi === lo ? air : 0.4 * air), hi + (hi > 0 || hi === lo ? air : 0.4 * air)];
}

/** How far the colours reach either side of zero: at least to one, where all is restored. @param {number[][]} rows */
export function reachOf(rows) {
  return Math.min(2, rows.flat().reduce((most, value) => (Number.isFinite(value) ? Math.max(most, Math.abs(value)) : most), 1));
}

/** Where a key leads among rows and windows, or null. Rows that are not `open` are passed over.
 * @param {string} key @param {Spot | null} at @param {boolean[]} open @param {number} windows @returns {Spot | null} */
export function nextSpot(key, at, open, windows) {
  const first = open.indexOf(true);
  const ends = /** @type {Record<string, [number, number]>} */ ({ Home: [0, -windows], End: [0, windows] });
  const move = ARROWS[key] ?? ends[key];
  if (!move || first < 0) return null;
  if (!at || !open[at[0]]) return [first, at ? at[1] : 0];
  let row = at[0];
  for (let next = row + move[0]; move[0] && next >= 0 && next < open.length; next += move[0]) {
    if (open[next]) {
      row = next;
      break;
    }
  }
  return [row, Math.min(windows - 1, Math.max(0, at[1] + move[1]))];
}
