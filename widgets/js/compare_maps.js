// @ts-check
/**
 * Many methods' maps of one target: which is shown how, in what order, and what is said of each; and the small maps
 * themselves, one button per method over the same picture.
 *
 * Methods have units of their own, so one slider sets the range of all as a share of each map's own range. By rank, a
 * colour means the same in every map: how many of the patches lie below. A small map is painted when it or the selection
 * changes; following the pointer only moves a frame over each, which paints nothing anew.
 */

import { blankCanvas, contextOf, groundsOf, paintHeat, paintLights, paintScene } from "./shared/canvas.js";
import { make, setText, whenResized } from "./shared/dom.js";
import { patchUnder } from "./shared/gestures.js";
import { clipToPicture, patchBox, patchName } from "./shared/grid.js";
import { colorTable, findMap, formatNumber, isNegligible, levelsOf, linearMap, mapText } from "./shared/maps.js";
import { position, rangeOf, strongest, valueOf } from "./shared/maps.js";
import { doubtful, paletteOf } from "./shared/view.js";

/**
 * @import { Found, Maps, Method, Shown } from "./shared/maps.js"
 * @typedef {Method & {scores: Record<string, (number | null)[]>}} ScoredMethod
 * @typedef {{name: string, group: string, lower: boolean}} Score
 * @typedef {{question: string, answer: string, model: string, seed: number, map: import("./shared/grid.js").PictureMap,
 *   chips: {text: string, kind: string, p: number | null}[], methods: ScoredMethod[], scores: Score[], picture: string,
 *   palettes: Record<string, string>, opacity: number, smooth: boolean, agreement: number[][] | null,
 *   refused: [string, string][], notes: string[]}} CompareSpec
 * @typedef {{opacity: number, smooth: boolean, spotlight: boolean, ownScale: boolean, byRank: boolean,
 *   range: number}} CompareDisplay
 * @typedef {{method: ScoredMethod, index: number, target: number, shown: Shown | null, palette: string, doubt: boolean}} Tile
 * @typedef {{root: HTMLButtonElement, canvas: HTMLCanvasElement, score: HTMLElement, line: HTMLElement,
 *   light: HTMLElement, heat: HTMLCanvasElement, whole: HTMLCanvasElement, key: string, lit: string, name: string}} Small
 * @typedef {{tiles: Tile[], order: number[], stage: number, sort: string, what: string, focus: number, selected: Set<number>,
 *   display: CompareDisplay}} TilesView
 * @typedef {{enlarge: (index: number) => void, point: (patch: number) => void}} TilesHost
 */

export const ALIKE = "agreement"; // the order by likeness to the enlarged map
const SIDE = 100; // CSS pixels a square picture's map has at least

/** Every method's map of a target, in the order given.
 * @param {CompareSpec} spec @param {Maps} maps @param {number} chip @param {CompareDisplay} display @returns {Tile[]} */
export function tilesOf(spec, maps, chip, display) {
  return spec.methods.map((method, index) => {
    const found = findMap(method, chip, method.layers.length - 1);
    const own = found?.own ? found : null; // the whole answer's map would pass for this word's
    const doubt = doubtful(method, own);
    const signed = method.signed && !display.byRank;
    const palette = paletteOf(signed, doubt, display.spotlight);
    const shown = own && shownAs(maps, method, own, display);
    return { method, index, target: own ? own.target : -1, shown, palette, doubt };
  });
}

/** @param {Maps} maps @param {ScoredMethod} method @param {Found} found @param {CompareDisplay} display
 * @returns {Shown} */
function shownAs(maps, method, { index, target }, { byRank, ownScale, range }) {
  const floor = method.floors?.[target] ?? 0;
  if (byRank) return rankedMap(maps, index, range, floor);
  const [lo, hi] = ownScale ? rangeOf(maps, index, method.signed) : [method.lo, method.hi];
  if (method.signed) return linearMap(maps, index, lo * range, hi * range, true, floor);
  return linearMap(maps, index, lo, lo + range * (hi - lo), false, floor);
}

/** A map by rank: colours begin above the weakest patches and spread over the strongest `share` of them.
 * @param {Maps} maps @param {number} index @param {number} share @param {number} [floor] @returns {Shown} */
export function rankedMap(maps, index, share, floor = 0) {
  const levels = levelsOf(maps, index);
  const ranks = ranksOf(levels);
  const most = Math.max(1, Math.round(share * maps.cells));
  return {
    key: [index, "rank", share].join(),
    levels,
    signed: false,
    fine: maps.scales[2 * index + 1],
    floor,
    ends: [`${most} strongest of ${maps.cells} patches`, "", "the strongest"],
    value: (cell) => valueOf(maps, index, cell),
    at: (cell) => position(ranks[levels[cell]], 1 - share, 1),
    table: (palette) => rankTable(palette, ranks, share),
  };
}

/** For each level the share of patches below it, half of its equals counted: 0 to 1.
 * @param {Uint8Array} levels */
export function ranksOf(levels) {
  const counts = new Uint32Array(256);
  for (const level of levels) counts[level] += 1;
  const ranks = new Float64Array(256);
  for (let level = 0, below = 0; level < 256; below += counts[level], level++) {
    ranks[level] = levels.length > 1 ? (below + Math.max(0, counts[level] - 1) / 2) / (levels.length - 1) : 0.5;
  }
  return ranks;
}

/** @param {Uint8Array} palette @param {Float64Array} ranks @param {number} share */
function rankTable(palette, ranks, share) {
  const table = colorTable(palette, (level) => position(ranks[level], 1 - share, 1));
  const bytes = new Uint8Array(table.buffer);
  ranks.forEach((rank, level) => rank < 1 - share && (bytes[4 * level + 3] = 0)); // the picture itself
  return table;
}

/** A tile's score, or null where it has none.
 * @param {CompareSpec} spec @param {Tile} tile @param {string} name @param {number} stage the enlarged method */
export function scoreOf(spec, tile, name, stage) {
  if (name === ALIKE) return spec.agreement?.[stage]?.[tile.index] ?? null;
  return tile.target < 0 ? null : (tile.method.scores[name]?.[tile.target] ?? null);
}

/** Methods in the order of a score, the best first; those without it last, equals as given.
 * @param {CompareSpec} spec @param {Tile[]} tiles @param {string} name "" for the order given
 * @param {boolean} worstFirst @param {number} stage @returns {number[]} */
export function orderOf(spec, tiles, name, worstFirst, stage) {
  const lower = spec.scores.some((score) => score.name === name && score.lower);
  const way = lower === worstFirst ? -1 : 1;
  const key = tiles.map((tile) => (name ? scoreOf(spec, tile, name, stage) : null));
  return tiles
    .map((tile) => tile.index)
    .sort((a, b) => {
      const [x, y] = [key[a], key[b]];
      if (x === null || y === null) return Number(x === null) - Number(y === null) || a - b;
      return way * (x - y) || a - b;
    });
}

/** How much of a map's positive part lies on the selected patches, or null where it has none.
 * @param {Shown} shown @param {Set<number>} selected */
export function shareOf(shown, selected) {
  let [inside, all] = [0, 0];
  for (let cell = 0; cell < shown.levels.length; cell++) {
    const value = Math.max(0, shown.value(cell));
    all += value;
    if (selected.has(cell)) inside += value;
  }
  return all > 0 ? inside / all : null;
}

/** The second line of a tile: what it says about the patch pointed at, else about the selection, else about itself.
 * @param {CompareSpec} spec @param {Tile} tile @param {number} focus @param {Set<number>} selected @param {string} what */
export function lineOf(spec, tile, focus, selected, what) {
  const { shown, method } = tile;
  if (!shown) return `no map for “${what}”`;
  if (focus >= 0) {
    const text = mapText(shown, focus);
    return text === "negligible" ? "negligible here" : `${text} here, rank ${rankOf(shown.levels, focus)}`;
  }
  if (isNegligible(shown)) return "negligible everywhere";
  if (selected.size) {
    const share = shareOf(shown, selected);
    return share === null ? "nothing anywhere" : `${Math.round(100 * share)}% in selection`;
  }
  if (tile.doubt) return "not shown to beat random";
  return method.control ? "control" : "";
}

/** A patch's place among all patches, the strongest first; equals share the best place.
 * @param {Uint8Array} levels @param {number} patch */
export function rankOf(levels, patch) {
  let above = 0;
  for (const level of levels) if (level > levels[patch]) above += 1;
  return above + 1;
}

/** Everything a screen reader should hear of a tile.
 * @param {CompareSpec} spec @param {Tile} tile @param {string} sort @param {number} stage @param {string} what */
export function tileName(spec, tile, sort, stage, what) {
  const score = sort ? scoreOf(spec, tile, sort, stage) : null;
  const nothing = isNegligible(tile.shown);
  const [first] = tile.shown && !nothing ? strongest(tile.shown.levels, 1) : [];
  const best = nothing ? "negligible everywhere" : first === undefined ? "" : `strongest ${patchName(spec.map, first)}`;
  const said = [tile.method.name, tile.method.control ? "control" : "", score === null ? "" : `${sort} ${formatScore(score)}`];
  const doubt = tile.doubt ? "not shown to beat random" : "";
  return [...said, doubt, tile.shown ? "" : `no map for ${what}`, best].filter(Boolean).join(", ");
}

/** The methods most and least like one, in words; "" where that was not measured.
 * @param {CompareSpec} spec @param {number} stage */
export function alikeText(spec, stage) {
  const row = spec.agreement?.[stage];
  if (!row || row.length < 2) return "";
  const others = row.map((value, i) => ({ value, name: spec.methods[i].name, i })).filter(({ i }) => i !== stage);
  others.sort((a, b) => b.value - a.value || a.i - b.i);
  const say = (/** @type {{value: number, name: string}} */ one) => `${one.name} (${formatScore(one.value)})`;
  const most = others.slice(0, 2).map(say).join(", ");
  return others.length < 3 ? `Most alike: ${most}.` : `Most alike: ${most}; least: ${say(others[others.length - 1])}.`;
}

/** @param {number | null} value */
export function formatScore(value) {
  if (value === null) return "–";
  if (Number.isInteger(value)) return `${value}`.replace("-", "−");
  const size = Math.abs(value);
  return size >= 0.001 && size < 10 ? value.toFixed(size < 0.1 ? 3 : 2).replace("-", "−") : formatNumber(value);
}

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
    whenResized(this.root, () => this.resize(), signal);
    signal.addEventListener("abort", () => (this.picture = null));
  }

  /** @param {TilesHost} host @param {AbortSignal} signal */
  listen(host, signal) {
    this.smalls.forEach(({ root, canvas }, index) => {
      root.addEventListener("click", () => host.enlarge((this.current = index)), { signal });
      root.addEventListener("focus", () => (this.current = index), { signal });
      const move = (/** @type {PointerEvent} */ event) => host.point(patchUnder(canvas, this.spec.map, event));
      canvas.addEventListener("pointermove", move, { signal });
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

  resize() {
    const width = this.smalls[0].canvas.clientWidth;
    const dot = Math.min(2, window.devicePixelRatio || 1);
    const across = Math.round(width * dot);
    if (!width || !this.picture || across === this.base.width) return;
    this.dot = dot;
    Object.assign(this, groundsOf(this.spec.map, this.picture, across));
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
    const faint = isNegligible(tile.shown);
    const marks = [tile.index === view.stage, tile.doubt, faint, !tile.shown, tile.index === this.current].map(Number).join("");
    const name = `${marks} ${view.sort} ${score} ${view.what}`;
    if (name === one.name) return;
    one.name = name;
    one.root.setAttribute("aria-pressed", String(tile.index === view.stage));
    one.root.setAttribute("aria-label", tileName(this.spec, tile, view.sort, view.stage, view.what));
    one.root.tabIndex = tile.index === this.current ? 0 : -1;
    one.root.classList.toggle("lab-doubt", tile.doubt);
    one.root.classList.toggle("lab-negligible", faint);
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
 * @param {import("./shared/grid.js").PictureMap} map */
export function tileWidth(map) {
  return Math.round(Math.min(190, Math.max(90, SIDE * Math.sqrt(map.width / map.height))));
}

/** @param {CompareSpec} spec @param {ScoredMethod} method @returns {Small} */
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
