// @ts-check
/**
 * The small maps: one button per method over the same picture, painted on canvases of one size. A map is painted
 * when it or the selection changes; following the pointer only moves a frame over each, which paints nothing anew.
 */

import { formatScore, lineOf, scoreOf, tileName } from "./compare_view.js";
import { blankCanvas, contextOf, paintBase, paintGround, paintHeat, paintLights, paintScene } from "./canvas.js";
import { make, setText } from "./dom.js";
import { clipToPicture, patchAt, patchBox } from "./grid.js";

/**
 * @typedef {import("./compare_view.js").CompareSpec} CompareSpec
 * @typedef {import("./compare_view.js").Tile} Tile
 * @typedef {{root: HTMLButtonElement, canvas: HTMLCanvasElement, score: HTMLElement, line: HTMLElement,
 *   light: HTMLElement, heat: HTMLCanvasElement, whole: HTMLCanvasElement, key: string, lit: string, name: string}} Small
 * @typedef {{tiles: Tile[], order: number[], stage: number, sort: string, what: string, focus: number, selected: Set<number>,
 *   display: import("./compare_view.js").CompareDisplay}} TilesView
 * @typedef {{enlarge: (index: number) => void, point: (patch: number) => void}} TilesHost
 */

const SIDE = 166; // CSS pixels a square picture's map has at least

export class Tiles {
  /** @param {CompareSpec} spec @param {Record<string, Uint8Array>} palettes @param {TilesHost} host @param {() => void} changed
   * @param {AbortSignal} signal */
  constructor(spec, palettes, host, changed, signal) {
    this.spec = spec;
    this.palettes = palettes;
    this.changed = changed;
    this.smalls = spec.methods.map((method) => small(spec, method));
    this.root = make("div", "lab-tiles", [], { role: "group", "aria-label": "Maps by method" });
    this.root.style.setProperty("--lab-tile", `${tileWidth(spec.map)}px`);
    this.order = /** @type {number[]} */ ([]);
    this.current = 0; // the one tab stop
    this.picture = /** @type {ImageBitmap | null} */ (null);
    this.base = this.ground = this.pale = blankCanvas(1, 1);
    this.dot = 1;
    this.lit = "";
    this.listen(host, signal);
    this.resized = new ResizeObserver(() => this.resize());
    this.resized.observe(this.root);
  }

  /** @param {TilesHost} host @param {AbortSignal} signal */
  listen(host, signal) {
    this.smalls.forEach(({ root, canvas }, index) => {
      root.addEventListener("click", () => host.enlarge((this.current = index)), { signal });
      root.addEventListener("focus", () => (this.current = index), { signal });
      const at = (/** @type {PointerEvent} */ event) => {
        const box = canvas.getBoundingClientRect();
        const k = this.spec.map.width / box.width;
        host.point(patchAt(this.spec.map, (event.clientX - box.left) * k, (event.clientY - box.top) * k));
      };
      canvas.addEventListener("pointermove", at, { signal });
      canvas.addEventListener("pointerleave", () => host.point(-1), { signal });
    });
    this.root.addEventListener("keydown", (event) => this.press(event), { signal });
  }

  /** Arrows go from map to map as they lie in the page; Home and End to the first and last.
   * @param {KeyboardEvent} event */
  press(event) {
    const next = nextTile(event.key, this.order.indexOf(this.current), this.order.length, this.columns());
    if (next < 0) return;
    event.preventDefault();
    this.current = this.order[next];
    this.smalls[this.current].root.focus();
    this.changed();
  }

  columns() {
    return getComputedStyle(this.root).gridTemplateColumns.split(" ").length;
  }

  /** @param {ImageBitmap} picture */
  show(picture) {
    this.picture = picture;
    this.resize();
  }

  close() {
    this.resized.disconnect();
    this.picture = null;
  }

  resize() {
    const width = this.smalls[0].canvas.clientWidth;
    const dot = Math.min(2, window.devicePixelRatio || 1);
    const across = Math.round(width * dot);
    if (!width || !this.picture || across === this.base.width) return;
    this.dot = dot;
    this.base = paintBase(this.spec.map, this.picture, across, (across * this.spec.map.height) / this.spec.map.width);
    this.ground = paintGround(this.base);
    this.pale = paintGround(this.base, 1);
    for (const one of this.smalls) {
      for (const canvas of [one.canvas, one.whole]) [canvas.width, canvas.height] = [this.base.width, this.base.height];
      one.key = one.lit = "";
    }
    this.changed();
  }

  /** @param {TilesView} view */
  paint(view) {
    if (view.order.join() !== this.order.join()) {
      const held = this.smalls.findIndex(({ root }) => root === document.activeElement);
      this.order = view.order;
      this.root.append(...this.order.map((index) => this.smalls[index].root));
      if (held >= 0) this.smalls[held].root.focus(); // moving an element takes the focus from it
    }
    const lights = [...view.selected].join();
    for (const tile of view.tiles) this.paintOne(tile, view, lights);
    this.light(view.focus);
  }

  /** Frame one patch in every map, or none.
   * @param {number} patch */
  light(patch) {
    const where = `${patch} ${this.base.width}`;
    if (where === this.lit) return;
    this.lit = where;
    const k = this.base.width / this.dot / this.spec.map.width; // CSS pixels per pixel of the picture
    const { map } = this.spec;
    const [left, top, right, bottom] = clipToPicture(map, patchBox(map, Math.max(0, patch))).map((v) => v * k);
    for (const { light } of this.smalls) {
      light.style.visibility = patch < 0 ? "hidden" : "visible";
      light.style.transform = `translate(${left}px, ${top}px)`;
      const size = [`${right - left}px`, `${bottom - top}px`];
      if (light.style.width !== size[0]) light.style.width = size[0];
      if (light.style.height !== size[1]) light.style.height = size[1];
    }
  }

  /** @param {Tile} tile @param {TilesView} view @param {string} lights */
  paintOne(tile, view, lights) {
    const one = this.smalls[tile.index];
    const { opacity, smooth } = view.display;
    const key = tile.shown ? [tile.shown.key, tile.palette, opacity, smooth].join() : "none";
    if (key !== one.key) this.paintMap(one, tile, view.display);
    if (key !== one.key || lights !== one.lit) {
      const ctx = contextOf(one.canvas);
      ctx.drawImage(one.whole, 0, 0);
      const lit = { selected: view.selected, dragging: [], hover: -1, cursor: -1 };
      paintLights(ctx, this.spec.map, lit, this.dot * 0.8);
    }
    [one.key, one.lit] = [key, lights];
    const score = view.sort ? scoreOf(this.spec, tile, view.sort, view.stage) : null;
    setText(one.score, view.sort ? formatScore(score) : "");
    setText(one.line, lineOf(this.spec, tile, view.focus, view.selected, view.what));
    const marks = [tile.index === view.stage, tile.doubt, !tile.shown, tile.index === this.current].map(Number).join("");
    const name = `${marks} ${view.sort} ${score} ${view.what}`;
    if (name === one.name) return;
    one.name = name;
    one.root.setAttribute("aria-pressed", String(tile.index === view.stage));
    one.root.setAttribute("aria-label", tileName(this.spec, tile, view.sort, view.stage, view.what));
    one.root.tabIndex = tile.index === this.current ? 0 : -1;
    one.root.classList.toggle("lab-doubt", tile.doubt);
    one.root.classList.toggle("lab-nothing", !tile.shown);
  }

  /** @param {Small} one @param {Tile} tile @param {{opacity: number, smooth: boolean}} display */
  paintMap(one, { shown, palette }, { opacity, smooth }) {
    const { map } = this.spec;
    if (shown) paintHeat(one.heat, shown.levels, shown.table(this.palettes[palette]), map.rows, map.cols, smooth);
    const grey = !shown || palette.startsWith("grey");
    const under = { base: grey ? this.pale : this.base, ground: grey ? this.pale : this.ground };
    const bare = { map, ...under, smooth, spotlight: palette.startsWith("light"), opacity };
    const dark = { selected: new Set(), dragging: [], hover: -1, cursor: -1 };
    paintScene(contextOf(one.whole), { ...bare, ...dark, heat: shown && one.heat }, this.dot);
  }
}

/** Where a key leads among maps in rows, or -1.
 * @param {string} key @param {number} at @param {number} count @param {number} columns */
export function nextTile(key, at, count, columns) {
  const steps = /** @type {Record<string, number>} */ ({ ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns });
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  const next = key in steps ? at + steps[key] : -1;
  return next >= 0 && next < count ? next : -1;
}

/** The least width of a small map: about the same area whatever the picture's shape.
 * @param {import("./grid.js").PictureMap} map */
export function tileWidth(map) {
  return Math.round(Math.min(260, Math.max(104, SIDE * Math.sqrt(map.width / map.height))));
}

/** @param {CompareSpec} spec @param {import("./compare_view.js").ScoredMethod} method @returns {Small} */
function small(spec, method) {
  const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", "lab-tile-canvas", [], { "aria-hidden": "true" }));
  canvas.style.aspectRatio = `${spec.map.width} / ${spec.map.height}`;
  const score = make("span", "lab-tile-score");
  const line = make("span", "lab-tile-line");
  const head = make("span", "lab-tile-head", [make("span", "lab-tile-name", [method.name], { title: method.name }), score]);
  const light = make("span", "lab-light");
  const picture = make("span", "lab-tile-picture", [canvas, light]);
  const root = /** @type {HTMLButtonElement} */ (make("button", "lab-tile", [picture, head, line], { type: "button" }));
  return { root, canvas, score, line, light, heat: blankCanvas(1, 1), whole: blankCanvas(1, 1), key: "", lit: "", name: "" };
}
