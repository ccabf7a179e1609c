// @ts-check
/**
 * ConnectorBench in the page: two connectors' answers, maps and nearest words, their difference, and the rank slider.
 * Everything for every rank is here already, so the slider asks nobody.
 */

import { blankCanvas, contextOf, groundsOf, paintHeat, paintScene } from "./shared/canvas.js";
import { carded, make, segmented, setText, slider, whenResized } from "./shared/dom.js";
import { ARROWS, patchUnder } from "./shared/gestures.js";
import { patchName } from "./shared/grid.js";
import { bytesOf, colorTable, formatNumber, formatPercent, levelsOf, NEGLIGIBLE } from "./shared/maps.js";
import { position, readMaps, readPalettes, valueOf } from "./shared/maps.js";
import { Panel, shows } from "./shared/panel.js";
import { told } from "./shared/parts.js";

/**
 * @typedef {{name: string, answer: string, words: {text: string, p: number | null}[], p: number | null,
 *   near: [string, number][][], r2: number | null, floor: number}} BenchSide
 * @typedef {{question: string, model: string, seed: number, map: import("./shared/grid.js").PictureMap, sides: BenchSide[],
 *   second: boolean, ranks: number[], lo: number, hi: number, picture: string, palettes: Record<string, string>}} BenchSpec
 * @typedef {{root: HTMLElement, name: HTMLElement, canvas: HTMLCanvasElement, said: HTMLElement, line: HTMLElement,
 *   key: string}} BenchTile
 */

const BENCH_OPACITY = 0.85;
const MIDDLE = 128; // the level of no difference

/** Which of the sides is on the right at a rank; rank 0 is the second connector.
 * @param {BenchSpec} spec @param {number} rank */
export function sideAt(spec, rank) {
  return rank ? 1 + Number(spec.second) + spec.ranks.indexOf(rank) : 1;
}

/** One map less another: levels around the middle, and the largest difference either way; 0 where `floor` is not reached.
 * @param {import("./shared/maps.js").Maps} maps @param {number} one @param {number} two @param {number} [floor] */
export function differenceOf(maps, one, two, floor = 0) {
  const change = (/** @type {number} */ cell) => valueOf(maps, two, cell) - valueOf(maps, one, cell);
  const values = Float32Array.from({ length: maps.cells }, (_, cell) => (Math.abs(change(cell)) < floor ? 0 : change(cell)));
  const reach = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const levels = Uint8Array.from(values, (value) => MIDDLE + (reach ? Math.round((127 * value) / reach) : 0));
  return { values, reach, levels };
}

/** The answers compared in one sentence.
 * @param {BenchSide} one @param {BenchSide} two */
export function benchSentence(one, two) {
  const same = one.answer === two.answer ? "the same answer as" : "another answer than";
  const p = (/** @type {BenchSide} */ side) => (side.p === null ? "" : ` (${formatPercent(side.p)})`);
  return `${two.name}${p(two)} gives ${same} ${one.name}${p(one)}.`;
}

class Bench extends Panel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["rank"]);
    this.spec = /** @type {BenchSpec} */ (model.get("spec"));
    const { map } = this.spec;
    this.maps = readMaps(model.get("maps"), model.get("scales"), map.rows * map.cols);
    this.palettes = readPalettes(this.spec.palettes);
    this.rank = this.model.get("rank") || this.spec.ranks[this.spec.ranks.length - 1]; // where the slider stands
    this.heat = blankCanvas(1, 1);
    this.picture = /** @type {ImageBitmap | null} */ (null);
    this.base = this.ground = this.heat;
    this.dot = 1;
    this.tiles = [0, 1, 2].map((place) => this.tile(place));
    this.open(this.build(), el);
    whenResized(this.tiles[0].canvas, () => this.resize(), this.stop.signal);
    this.load();
  }

  build() {
    const about = make("span", "lab-about", [`${this.spec.model} · seed ${this.spec.seed}`]);
    const asked = make("div", "lab-question", [this.spec.question], { role: "heading", "aria-level": "2" });
    this.sentence = make("p", "lab-caption lab-bench-sentence");
    const row = make("div", "lab-bench-tiles", this.tiles.map(({ root }) => root));
    const parts = [make("div", "lab-head", [about]), asked, ...told(this.spec), this.controls(), row, this.sentence, this.live];
    return carded("lab-widget lab-bench", "Two connectors compared", parts);
  }

  controls() {
    const { spec, stop } = this;
    const { signal } = stop;
    const last = spec.ranks.length - 1;
    const names = [...(spec.second ? [spec.sides[1].name] : []), ...(spec.ranks.length ? ["cut to a rank"] : [])];
    const pick = (/** @type {number} */ i) => this.show(spec.second && i === 0 ? 0 : this.rank);
    this.which = segmented("Compared with", names, pick, signal);
    const input = (/** @type {number} */ place) => this.show((this.rank = spec.ranks[place]));
    this.range = slider({ label: "Rank", min: 0, max: Math.max(0, last), step: 1, value: Math.max(0, last), input, signal });
    this.which.root.hidden = names.length < 2;
    this.range.root.hidden = last < 0;
    return make("div", "lab-bar-row", [this.which.root, this.range.root]);
  }

  /** @param {number} rank */
  show(rank) {
    this.keep("rank", rank);
    setText(this.live, benchSentence(this.spec.sides[0], this.spec.sides[sideAt(this.spec, rank)]));
  }

  /** @param {number} place @returns {BenchTile} */
  tile(place) {
    const label = ["First connector's map", "Second connector's map", "Difference of the maps"][place];
    const attributes = { tabindex: "0", role: "application", "aria-roledescription": "map", "aria-label": label };
    const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", "lab-canvas", [], attributes));
    const { map } = this.spec;
    canvas.style.aspectRatio = `${map.width} / ${map.height}`;
    const { signal } = this.stop;
    canvas.addEventListener("pointermove", (event) => this.light(patchUnder(canvas, map, event)), { signal });
    canvas.addEventListener("pointerleave", () => this.light(-1), { signal });
    canvas.addEventListener("keydown", (event) => this.press(event), { signal });
    const [name, said, line] = ["lab-bench-name", "lab-bench-said", "lab-bench-line"].map((one) => make("div", one));
    return { root: make("div", "lab-bench-tile", [name, said, canvas, line]), name, canvas, said, line, key: "" };
  }

  /** @param {KeyboardEvent} event */
  press(event) {
    const { rows, cols } = this.spec.map;
    if (event.key === "Escape") return this.light(-1);
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    const [down, right] = ARROWS[event.key];
    const next = this.pointing.hover < 0 ? 0 : this.pointing.hover + down * cols + right;
    if (next < 0 || next >= rows * cols) return;
    this.light(next);
    setText(this.live, `${patchName(this.spec.map, next)}: ${this.tiles.map((_, place) => this.lineAt(place, next)).join("; ")}`);
  }

  /** @param {number} patch */
  light(patch) {
    if (patch !== this.pointing.hover) this.set(this.pointing, { hover: patch });
  }

  async load() {
    this.picture = await createImageBitmap(new Blob([bytesOf(this.model.get("picture")).slice()], { type: this.spec.picture }));
    this.resize();
  }

  resize() {
    const width = this.tiles[0].canvas.clientWidth;
    if (!width || !this.picture) return;
    this.dot = Math.min(2, window.devicePixelRatio || 1);
    const { map } = this.spec;
    const across = Math.round(width * this.dot);
    if (across === this.base.width) return;
    Object.assign(this, groundsOf(map, this.picture, across));
    for (const one of this.tiles) {
      [one.canvas.width, one.canvas.height] = [this.base.width, this.base.height];
      one.key = "";
    }
    this.refresh();
  }

  right() {
    return sideAt(this.spec, this.model.get("rank"));
  }

  paint() {
    const { spec } = this;
    const rank = this.model.get("rank");
    const right = this.right();
    const [one, two] = [spec.sides[0], spec.sides[right]];
    if (rank) this.rank = rank;
    const picked = rank && spec.second ? 1 : 0;
    this.which?.show(picked, picked);
    if (this.range) {
      this.range.range.value = `${spec.ranks.indexOf(this.rank)}`;
      this.range.range.setAttribute("aria-valuetext", `rank ${this.rank}`);
      setText(this.range.output, `${this.rank}`);
    }
    if (this.sentence) setText(this.sentence, benchSentence(one, two));
    if (!this.change || this.change.right !== right) {
      this.change = { right, ...differenceOf(this.maps, 0, right, this.floorOf(2)) };
    }
    this.tiles.forEach((tile, place) => this.paintTile(tile, place));
  }

  /** @param {BenchTile} tile @param {number} place */
  paintTile(tile, place) {
    const right = this.right();
    const { spec } = this;
    const side = spec.sides[place ? right : 0];
    const hover = this.pointing.hover;
    setText(tile.name, place < 2 ? side.name : `${side.name} − ${spec.sides[0].name}`);
    const fit = side.r2 === null ? "" : ` · R² ${formatNumber(side.r2)}`;
    if (place === 2) setText(tile.said, `orange: more, blue: less, full at ±${formatNumber(this.change?.reach ?? 0)}`);
    else if (tile.said.dataset.side !== String(place ? right : 0)) {
      tile.said.dataset.side = String(place ? right : 0);
      const words = side.words.map(({ text, p }) =>
        make("span", "lab-bench-word", [text, ...(p === null ? [] : [make("small", "", [` ${formatPercent(p)}`])])]),
      );
      tile.said.replaceChildren(...words, make("small", "lab-bench-fit", [fit]));
    }
    const nothing = this.maps.cells > 0 && Array.from({ length: this.maps.cells }).every((_, cell) => this.negligible(place, cell));
    const hint = !nothing ? "Point at a patch." : place < 2 ? NEGLIGIBLE : "The maps differ by less than the noise floor.";
    setText(tile.line, hover < 0 ? hint : this.lineAt(place, hover));
    const key = [place && right, hover, this.base.width].join();
    if (!this.picture || key === tile.key) return;
    tile.key = key;
    const { map } = spec;
    const [levels, table] = this.colors(place, place ? right : 0);
    paintHeat(this.heat, levels, table, map.rows, map.cols, false);
    const lights = { selected: new Set(this.model.get("selected")), dragging: [], hover, cursor: -1 };
    const under = { map, base: this.base, ground: this.ground, heat: this.heat };
    const look = { smooth: false, spotlight: false, opacity: BENCH_OPACITY };
    paintScene(contextOf(tile.canvas), { ...under, ...look, ...lights }, this.dot);
  }

  /** @param {number} place @param {number} index @returns {[Uint8Array, Uint32Array]} */
  colors(place, index) {
    const { lo, hi } = this.spec;
    if (place === 2 && this.change) {
      return [this.change.levels, colorTable(this.palettes.diverging, (level) => position(level - MIDDLE, -127, 127))];
    }
    const [offset, step] = this.maps.scales.subarray(2 * index, 2 * index + 2);
    const palette = this.palettes[lo < 0 ? "diverging" : "sequential"];
    return [levelsOf(this.maps, index), colorTable(palette, (level) => position(offset + level * step, lo, hi))];
  }

  /** What a map, or the difference of both, must reach to be more than rounding; 0 where nobody knows it.
   * @param {number} place */
  floorOf(place) {
    const [one, two] = [this.spec.sides[0].floor, this.spec.sides[this.right()].floor];
    return [one, two, Math.hypot(one, two)][place];
  }

  /** Whether a patch's value, or change, is below its noise floor. @param {number} place @param {number} patch */
  negligible(place, patch) {
    const floor = this.floorOf(place);
    if (!(floor > 0)) return false;
    if (place === 2) return this.change?.values[patch] === 0;
    const index = place ? this.right() : 0;
    return Math.abs(valueOf(this.maps, index, patch)) < Math.max(floor, this.maps.scales[2 * index + 1] / 2); // a level holds 0
  }

  /** A patch's value and nearest words. @param {number} place @param {number} patch */
  lineAt(place, patch) {
    const faint = this.negligible(place, patch);
    if (place === 2) return this.change ? `difference ${faint ? "negligible" : formatNumber(this.change.values[patch])}` : "";
    const index = place ? this.right() : 0;
    const near = (this.spec.sides[index].near[patch] ?? []).map(([word, cosine]) => `${word} ${cosine.toFixed(2)}`);
    const value = faint ? "negligible" : formatNumber(valueOf(this.maps, index, patch));
    return [value, ...(near.length ? [`near ${near.join(", ")}`] : [])].join(" · ");
  }

  close() {
    super.close();
    this.picture?.close();
  }
}

export const renderBench = shows(Bench);
