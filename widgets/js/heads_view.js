// @ts-check
/**
 * Attention of every head to every patch, read from one byte per value: a map's value is peak * (level / 255)²,
 * so that what is small beside its peak keeps its digits. Maps, the layer x head matrix, sums over patches. Pure.
 */

import { chipText } from "./chips.js";
import { bytesOf, formatPercent, formatValue, position } from "./maps.js";

/**
 * @typedef {import("./maps.js").Shown} Shown
 * @typedef {{question: string, answer: string, model: string, seed: number, map: import("./grid.js").PictureMap,
 *   chips: {text: string, kind: string, p: number | null}[], layers: number, heads: number, picture: string,
 *   palettes: Record<string, string>, opacity: number, notes: string[]}} HeadsSpec
 * @typedef {{levels: Uint8Array, peaks: Float32Array, shares: Float32Array, words: number, layers: number, heads: number,
 *   cells: number}} Heads maps in the order words, layers, heads; `shares` are what each head spends on the whole picture
 * @typedef {{layer: number, head: number}} At a head, or with head -1 the mean of a layer's heads
 */

const SQUARE = Float32Array.from({ length: 256 }, (_, level) => (level / 255) ** 2);
export const MEAN = -1; // in place of a head: the mean over the layer's heads

/** @param {DataView | Uint8Array} levels @param {DataView | Uint8Array} scales @param {HeadsSpec} spec @returns {Heads} */
export function readHeads(levels, scales, { chips, layers, heads, map }) {
  const both = new Float32Array(bytesOf(scales).slice().buffer); // all peaks, then all shares
  const half = both.length / 2;
  const rest = { words: chips.length, layers, heads, cells: map.rows * map.cols };
  return { levels: bytesOf(levels), peaks: both.subarray(0, half), shares: both.subarray(half), ...rest };
}

/** @param {Heads} all @param {number} word @param {number} layer @param {number} head */
function indexOf(all, word, layer, head) {
  return (word * all.layers + layer) * all.heads + head;
}

/** The attention of one head, or of a layer's heads on average, to every patch.
 * @param {Heads} all @param {number} word @param {At} at @returns {Float32Array} */
export function headValues(all, word, { layer, head }) {
  const out = new Float32Array(all.cells);
  const from = head === MEAN ? 0 : head;
  const to = head === MEAN ? all.heads : head + 1;
  for (let h = from; h < to; h++) {
    const index = indexOf(all, word, layer, h);
    const scale = all.peaks[index] / (to - from);
    for (let i = 0, start = index * all.cells; i < all.cells; i++) out[i] += scale * SQUARE[all.levels[start + i]];
  }
  return out;
}

/** The map of a head as it is painted, its colours up to `top` (0: its own highest).
 * @param {Heads} all @param {number} word @param {At} at @param {number} top @returns {Shown} */
export function headMap(all, word, at, top) {
  const values = headValues(all, word, at);
  const peak = values.reduce((a, b) => Math.max(a, b), 0);
  const levels = Uint8Array.from(values, (value) => (peak > 0 ? Math.round(255 * Math.sqrt(value / peak)) : 0));
  const high = top || peak;
  const fine = peak / 255;
  return {
    key: [word, at.layer, at.head, high].join(),
    levels,
    signed: false,
    fine,
    ends: ["0", "", formatValue(high, high / 255)],
    value: (cell) => values[cell],
    at: (cell) => position(values[cell], 0, high),
    table: (palette) => squareTable(palette, peak, high),
  };
}

/** The colour of each level of a map whose value is peak * (level / 255)².
 * @param {Uint8Array} palette @param {number} peak @param {number} high */
export function squareTable(palette, peak, high) {
  const table = new Uint8Array(4 * 256);
  for (let level = 0; level < 256; level++) {
    const color = Math.round(255 * position(peak * SQUARE[level], 0, high));
    table.set(palette.subarray(4 * color, 4 * color + 4), 4 * level);
  }
  return new Uint32Array(table.buffer);
}

/** What each head of each layer spends on some patches, on the whole picture where none is named; layers x heads.
 * @param {Heads} all @param {number} word @param {Iterable<number>} patches @returns {Float32Array} */
export function spentOn(all, word, patches) {
  const count = all.layers * all.heads;
  const first = word * count;
  const wanted = [...patches];
  if (!wanted.length) return all.shares.slice(first, first + count);
  const out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const start = (first + i) * all.cells;
    let sum = 0;
    for (const patch of wanted) sum += SQUARE[all.levels[start + patch]];
    out[i] = sum * all.peaks[first + i];
  }
  return out;
}

/** Mean of each layer's heads. @param {Float32Array} spent @param {number} heads */
export function layerMeans(spent, heads) {
  const row = (/** @type {number} */ layer) => spent.subarray(layer * heads, (layer + 1) * heads);
  return Float32Array.from({ length: spent.length / heads }, (_, layer) => mean(row(layer)));
}

/** @param {Float32Array} values */
export function mean(values) {
  return values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
}

/** The heads that spend the most, strongest first. @param {Float32Array} spent @param {number} heads @param {number} count
 * @returns {(At & {value: number})[]} */
export function topHeads(spent, heads, count) {
  const order = Array.from(spent.keys()).sort((a, b) => spent[b] - spent[a] || a - b);
  return order.slice(0, count).map((i) => ({ layer: Math.floor(i / heads), head: i % heads, value: spent[i] }));
}

/** @param {At} at */
export function headName({ layer, head }) {
  return head === MEAN ? `layer ${layer}, mean of its heads` : `layer ${layer}, head ${head}`;
}

/** A share of attention. @param {number} share */
export function shareText(share) {
  return share > 0 ? formatPercent(share) : "0%";
}

/** What the matrix counts: attention on the whole picture, on one patch, or on those selected.
 * @param {number[]} patches @param {boolean} pointed */
export function onWhat(patches, pointed) {
  if (!patches.length) return "the picture";
  if (pointed) return "this patch";
  return patches.length === 1 ? "the selected patch" : `the ${patches.length} selected patches`;
}

/** @param {HeadsSpec} spec @param {number} word */
export function wordName(spec, word) {
  return chipText(spec.chips[word]);
}
