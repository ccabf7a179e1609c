// @ts-check
/**
 * Attention of every head to every patch, read from one byte per value: a map's value is peak * (level / 255)²,
 * so that what is small beside its peak keeps its digits. Maps, sums over patches, and the layer x head matrix on a
 * canvas: a row per layer, a column per head, the mean of the row beside it.
 */

import { blankCanvas, contextOf } from "./shared/canvas.js";
import { make, whenResized } from "./shared/dom.js";
import { ARROWS, spotGestures } from "./shared/gestures.js";
import { bytesOf, colorTable, formatValue, position } from "./shared/maps.js";
import { chipText } from "./shared/parts.js";

/**
 * @typedef {import("./shared/maps.js").Shown} Shown
 * @typedef {{question: string, answer: string, model: string, seed: number, map: import("./shared/grid.js").PictureMap,
 *   chips: {text: string, kind: string, p: number | null}[], layers: number, heads: number, picture: string,
 *   palettes: Record<string, string>, opacity: number, notes: string[]}} HeadsSpec
 * @typedef {{levels: Uint8Array, peaks: Float32Array, shares: Float32Array, words: number, layers: number, heads: number,
 *   cells: number}} Heads maps in the order words, layers, heads; `shares` are what each head spends on the whole picture
 * @typedef {{layer: number, head: number}} At a head, or with head -1 the mean of a layer's heads
 * @typedef {{layers: number, heads: number, cell: [number, number], left: number, top: number, gap: number}} Layout CSS pixels
 * @typedef {{hover: (at: At | null) => void, pick: (at: At | null) => void, kept: () => At}} MatrixHost
 * @typedef {{key: string, spent: Float32Array, means: Float32Array, high: number, colors: Uint8Array, kept: At,
 *   hover: At | null}} MatrixView
 */

const SQUARE = Float32Array.from({ length: 256 }, (_, level) => (level / 255) ** 2);
export const MEAN = -1; // in place of a head: the mean over the layer's heads
const BESIDE = 40; // CSS pixels for the layers' numbers
const ABOVE = 34; // for the heads' numbers and the titles
const GAP = 8; // before the mean
const AFTER = 12; // for its title, wider than a cell
const LARGEST = 46; // side of a cell
const MATRIX_TALLEST = 400;
const MATRIX_HELP = "Arrow keys move over layers and heads; the last column is the mean of a layer's heads.";

/** @param {DataView | Uint8Array} levels @param {DataView | Uint8Array} scales @param {HeadsSpec} spec @returns {Heads} */
export function readHeads(levels, scales, { chips, layers, heads, map }) {
  const both = new Float32Array(bytesOf(scales).slice().buffer); // all peaks, then all shares
  const half = both.length / 2;
  const rest = { words: chips.length, layers, heads, cells: map.rows * map.cols };
  return { levels: bytesOf(levels), peaks: both.subarray(0, half), shares: both.subarray(half), ...rest };
}

/** The attention of one head, or of a layer's heads on average, to every patch.
 * @param {Heads} all @param {number} word @param {At} at @returns {Float32Array} */
export function headValues(all, word, { layer, head }) {
  const out = new Float32Array(all.cells);
  const from = head === MEAN ? 0 : head;
  const to = head === MEAN ? all.heads : head + 1;
  for (let h = from; h < to; h++) {
    const index = (word * all.layers + layer) * all.heads + h;
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
    floor: 0,
    ends: ["0", "", formatValue(high, high / 255)],
    value: (cell) => values[cell],
    at: (cell) => position(values[cell], 0, high),
    table: (palette) => colorTable(palette, (level) => position(peak * SQUARE[level], 0, high)),
  };
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

export class Matrix {
  /** @param {number} layers @param {number} heads @param {MatrixHost} host @param {() => void} changed
   * @param {AbortSignal} signal */
  constructor(layers, heads, host, changed, signal) {
    this.layers = layers;
    this.heads = heads;
    this.changed = changed;
    const name = `Attention on the picture, ${layers} layers by ${heads} heads. ${MATRIX_HELP}`;
    const attributes = { tabindex: "0", role: "application", "aria-roledescription": "matrix", "aria-label": name };
    this.canvas = /** @type {HTMLCanvasElement} */ (make("canvas", "lab-matrix", [], attributes));
    this.cells = blankCanvas(1, 1);
    this.key = "";
    this.layout = layoutOf(layers, heads, 1);
    this.dot = 1;
    const find = (/** @type {number} */ x, /** @type {number} */ y) => cellAt(this.layout, x, y);
    const next = (/** @type {string} */ key) => nextCell(key, host.kept(), layers, heads);
    spotGestures(this.canvas, { ...host, find, next }, signal);
    whenResized(this.canvas, () => this.resize(), signal);
  }

  resize() {
    const width = this.canvas.parentElement?.clientWidth ?? 0;
    if (!width) return;
    this.dot = Math.min(2, window.devicePixelRatio || 1);
    this.layout = layoutOf(this.layers, this.heads, width);
    const [wide, high] = sizeOf(this.layout);
    const [across, down] = [Math.round(wide * this.dot), Math.round(high * this.dot)];
    if (this.canvas.width === across && this.canvas.height === down) return;
    [this.canvas.style.width, this.canvas.style.height] = [`${wide}px`, `${high}px`];
    for (const canvas of [this.canvas, this.cells]) [canvas.width, canvas.height] = [across, down];
    this.key = "";
    this.changed();
  }

  /** @param {MatrixView} view */
  paint(view) {
    const style = getComputedStyle(this.canvas);
    const key = `${view.key} ${style.color}`;
    if (key !== this.key) this.paintCells(view, style);
    this.key = key;
    const ctx = contextOf(this.canvas);
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.canvas.width, this.canvas.height);
    ctx.drawImage(this.cells, 0, 0);
    ctx.setTransform(this.dot, 0, 0, this.dot, 0, 0);
    frame(ctx, cellBox(this.layout, view.kept), style.color, style.backgroundColor, 2);
    if (view.hover) frame(ctx, cellBox(this.layout, view.hover), style.color, style.backgroundColor, 1);
  }

  /** @param {MatrixView} view @param {CSSStyleDeclaration} style */
  paintCells({ spent, means, high, colors }, style) {
    const ctx = contextOf(this.cells);
    ctx.setTransform(this.dot, 0, 0, this.dot, 0, 0);
    ctx.clearRect(0, 0, this.cells.width, this.cells.height);
    const line = Math.min(...this.layout.cell) >= 9 ? 1 : 0;
    for (let layer = 0; layer < this.layers; layer++) {
      for (let column = 0; column <= this.heads; column++) {
        const head = column < this.heads ? column : MEAN;
        const value = head === MEAN ? means[layer] : spent[layer * this.heads + head];
        const color = 4 * Math.round(255 * position(value, 0, high));
        ctx.fillStyle = `rgb(${colors[color]}, ${colors[color + 1]}, ${colors[color + 2]})`;
        const [x, y, w, h] = cellBox(this.layout, { layer, head });
        ctx.fillRect(x, y, w - line, h - line);
      }
    }
    paintNumbers(ctx, this.layout, style);
  }
}

/** @param {number} layers @param {number} heads @param {number} width CSS pixels there are @returns {Layout} */
export function layoutOf(layers, heads, width) {
  const wide = Math.max(3, Math.min(LARGEST, Math.floor((width - BESIDE - GAP - AFTER) / (heads + 1))));
  const high = Math.max(3, Math.min(wide, Math.floor((MATRIX_TALLEST - ABOVE) / layers)));
  return { layers, heads, cell: [wide, high], left: BESIDE, top: ABOVE, gap: GAP };
}

/** @param {Layout} layout @returns {[number, number]} */
export function sizeOf({ layers, heads, cell, left, top, gap }) {
  return [left + (heads + 1) * cell[0] + gap + AFTER, top + layers * cell[1] + 2];
}

/** @param {Layout} layout @param {At} at @returns {[number, number, number, number]} left, top, width, height */
export function cellBox({ heads, cell, left, top, gap }, { layer, head }) {
  const x = head === MEAN ? left + heads * cell[0] + gap : left + head * cell[0];
  return [x, top + layer * cell[1], cell[0], cell[1]];
}

/** The cell under a place, or null between and beside cells.
 * @param {Layout} layout @param {number} x @param {number} y @returns {At | null} */
export function cellAt({ layers, heads, cell, left, top, gap }, x, y) {
  const layer = Math.floor((y - top) / cell[1]);
  if (layer < 0 || layer >= layers) return null;
  const head = Math.floor((x - left) / cell[0]);
  if (head >= 0 && head < heads) return { layer, head };
  const after = x - left - heads * cell[0] - gap;
  return after >= 0 && after < cell[0] ? { layer, head: MEAN } : null;
}

/** Where a key leads, or null. @param {string} key @param {At} at @param {number} layers @param {number} heads
 * @returns {At | null} */
export function nextCell(key, { layer, head }, layers, heads) {
  const column = head === MEAN ? heads : head;
  const to = (/** @type {number} */ row, /** @type {number} */ across) => {
    const [y, x] = [Math.min(layers - 1, Math.max(0, row)), Math.min(heads, Math.max(0, across))];
    return { layer: y, head: x === heads ? MEAN : x };
  };
  if (key in ARROWS) return to(layer + ARROWS[key][0], column + ARROWS[key][1]);
  if (key === "Home") return to(layer, 0);
  if (key === "End") return to(layer, heads);
  return null;
}

/** @param {CanvasRenderingContext2D} ctx @param {Layout} layout @param {CSSStyleDeclaration} style */
function paintNumbers(ctx, { layers, heads, cell, left, top, gap }, style) {
  ctx.fillStyle = style.color;
  ctx.globalAlpha = 0.72;
  ctx.font = `11px ${style.fontFamily}`;
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  const every = (/** @type {number} */ size, /** @type {number} */ room) => Math.max(1, 2 ** Math.ceil(Math.log2(room / size)));
  for (let layer = 0; layer < layers; layer += every(cell[1], 13)) {
    ctx.fillText(`${layer}`, left - 6, top + (layer + 0.5) * cell[1]);
  }
  ctx.textAlign = "center";
  for (let head = 0; head < heads; head += every(cell[0], 18)) ctx.fillText(`${head}`, left + (head + 0.5) * cell[0], top - 8);
  ctx.fillText("mean", left + (heads + 0.5) * cell[0] + gap, top - 8);
  ctx.textAlign = "left";
  ctx.fillText("head", left, top - 25);
  ctx.textAlign = "right";
  ctx.fillText("layer", left - 6, top - 8);
  ctx.globalAlpha = 1;
}

/** @param {CanvasRenderingContext2D} ctx @param {[number, number, number, number]} box @param {string} ink @param {string} paper
 * @param {number} width */
function frame(ctx, [x, y, w, h], ink, paper, width) {
  ctx.strokeStyle = paper;
  ctx.lineWidth = width + 2;
  ctx.strokeRect(x - 0.5, y - 0.5, w, h);
  ctx.strokeStyle = ink;
  ctx.lineWidth = width;
  ctx.strokeRect(x - 0.5, y - 0.5, w, h);
}
