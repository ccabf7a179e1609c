// @ts-check
/**
 * CompareView: which map to trust. Every method's map of the same target, over the same picture.
 *
 * All maps, small (``compare_maps.js``), in the order of any score; beside them the enlarged one with what made it, its
 * scores beside those of the other methods, its likes. Maps arrive once; targets, order, colours and the enlarged map change
 * here and ask Python nothing. Python hears of what is kept: `target`, `method` (the enlarged one), `sort`, `selected`.
 */

import { blankCanvas, contextOf, groundsOf, paintHeat, paintScene, write } from "./shared/canvas.js";
import { choices, make, opacitySlider, section, segmented, setText, slider } from "./shared/dom.js";
import { MapPanel, STAGE } from "./shared/map_panel.js";
import { isNegligible, NEGLIGIBLE, readMaps } from "./shared/maps.js";
import { shows } from "./shared/panel.js";
import { chipText, readout, topList, wordChips } from "./shared/parts.js";
import { saveCanvas } from "./shared/surface.js";
import { summary } from "./shared/view.js";
import { ALIKE, alikeText, formatScore, orderOf, scoreOf, Tiles, tilesOf } from "./compare_maps.js";

/**
 * @import { CompareDisplay, CompareSpec, Tile, TilesView } from "./compare_maps.js"
 * @typedef {ReturnType<Compare["view"]>} CompareState
 * @typedef {{tiles: Tile[], stage: number}} StageView
 */

const LEAST_RANGE = 5; // per cent
const MOST_NOTES = 3; // shown without being asked for
const KEY = "Bars are this map's scores, ticks the other methods', rings the controls'.";
const SHEET = { margin: 48, side: 250, gap: 20, columns: 5, under: 56, head: 190 }; // pixels

class Compare extends MapPanel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["target", "method", "sort"]);
    const { map, opacity, smooth } = this.spec;
    this.maps = readMaps(model.get("maps"), model.get("scales"), map.rows * map.cols);
    this.display = /** @type {CompareDisplay} */ ({ opacity, smooth, spotlight: false, ownScale: true, byRank: false, range: 1 });
    this.peek = { target: -1 };
    this.worstFirst = false;
    this.kept = { key: "", tiles: /** @type {Tile[]} */ ([]) };
    const { signal } = this.stop;
    const host = {
      enlarge: (/** @type {number} */ index) => this.choose("method", this.spec.methods[index].name),
      point: (/** @type {number} */ hover) => this.point({ hover }),
    };
    this.tiles = new Tiles(this.spec, this.palettes, host, this.refresh, signal);
    this.open(this.build(), el).then(() => this.surface.picture && this.tiles.show(this.surface.picture));
  }

  build() {
    const spec = /** @type {CompareSpec} */ (this.spec);
    const { signal } = this.stop;
    const peek = (/** @type {number} */ target) => this.set(this.peek, { target });
    const chips = this.add(wordChips(/** @type {any} */ (spec), (i) => this.choose("target", i), peek, signal));
    chips.setAttribute("aria-label", "What is explained");
    const figure = this.figure([], readout(), STAGE);
    const read = [aboutMap(spec), scoreLines(spec), topList((hover) => this.point({ hover }), signal)];
    const side = make("div", "lab-side lab-scroll", read.map((part) => this.add(part)));
    const maps = make("div", "lab-scroll lab-maps", [this.tiles.root, notesOf(spec)]);
    const bars = [this.add(this.orderBar()), this.add(this.colorBar())];
    const about = `${this.patchesText} · ${spec.methods.length} methods`;
    const text = { class: "lab-compare lab-screen", label: "Compare methods", about };
    return this.card(text, [chips, ...bars, make("div", "lab-body", [maps, figure, side])]);
  }

  /** By which score the maps are ordered, and which end comes first. */
  orderBar() {
    const spec = /** @type {CompareSpec} */ (this.spec);
    const { signal } = this.stop;
    const names = ["", ...spec.scores.map((score) => score.name), ...(spec.agreement ? [ALIKE] : [])];
    const items = names.map((name) => ({ name: name || "as given", content: [name || "as given"] }));
    const by = choices({ label: "Sort by", className: "lab-pills", items, pick: (i) => this.choose("sort", names[i]), signal });
    const pick = (/** @type {number} */ i) => this.set(/** @type {any} */ (this), { worstFirst: i === 1 });
    const way = segmented("Order", ["Best first", "Worst first"], pick, signal);
    return {
      root: make("div", "lab-bar-row", [make("span", "lab-label", ["Sort by"]), by.root, way.root]),
      update: (/** @type {CompareState} */ view) => {
        const at = Math.max(0, names.indexOf(view.sort));
        by.show(at, at);
        way.show(Number(this.worstFirst), -1);
        way.root.classList.toggle("lab-unused", !view.sort);
      },
    };
  }

  /** Colours of all maps at once: their range, what they stand for, how they lie on the picture. */
  colorBar() {
    const { signal } = this.stop;
    const change = (/** @type {Partial<CompareDisplay>} */ display) => this.set(this.display, display);
    const input = (/** @type {number} */ percent) => change({ range: percent / 100 });
    const range = slider({ label: "Colour range", min: LEAST_RANGE, max: 100, step: 5, value: 100, input, signal });
    const opacity = opacitySlider(this.display, change, signal);
    const scale = segmented("Scale", ["Each map", "Each method"], (i) => change({ ownScale: i === 0 }), signal);
    const paint = segmented("Colours by", ["Value", "Rank"], (i) => change({ byRank: i === 1 }), signal);
    const look = segmented("Look", ["Patches", "Smooth"], (i) => change({ smooth: i === 1 }), signal);
    return {
      root: make("div", "lab-bar-row", [range.root, opacity.root, paint.root, scale.root, look.root]),
      update: (/** @type {CompareState} */ { display }) => {
        const share = `${Math.round(100 * display.range)}%`;
        setText(range.output, display.byRank ? `top ${share}` : share);
        opacity.show(display.opacity);
        paint.show(Number(display.byRank), -1);
        scale.show(Number(!display.ownScale), -1);
        scale.root.classList.toggle("lab-unused", display.byRank);
        look.show(Number(display.smooth), -1);
      },
    };
  }

  /** @param {string} name @param {any} value */
  choose(name, value) {
    this.peek = { target: -1 };
    this.keep(name, value);
    const view = this.view();
    const best = view.order.slice(0, 3).map((index) => this.spec.methods[index].name);
    this.say(name === "sort" ? `In this order: ${best.join(", ")}.` : summary(view));
  }

  /** What is to be seen; for the parts that read one map, the enlarged one. */
  view() {
    const { display, peek } = this;
    const spec = /** @type {CompareSpec} */ (this.spec);
    const chip = peek.target >= 0 ? peek.target : this.model.get("target");
    const key = JSON.stringify([chip, display]);
    if (key !== this.kept.key) this.kept = { key, tiles: tilesOf(spec, this.maps, chip, display) };
    const { tiles } = this.kept;
    const name = this.model.get("method");
    const stage = Math.max(0, spec.methods.map((method) => method.name).indexOf(name));
    const sort = /** @type {string} */ (this.model.get("sort"));
    const { shown, palette, method } = tiles[stage];
    const what = chipText(spec.chips[chip]);
    return {
      ...{ tiles, stage, sort, what, chip, word: this.model.get("target"), display, map: spec.map, shown, palette },
      order: orderOf(spec, tiles, sort, this.worstFirst, stage),
      focus: this.focus,
      selected: this.selected,
      mean: this.surface.mean,
      title: `${method.name} · “${what}”`,
      said: !shown ? `${method.name} has no map for “${what}”.` : isNegligible(shown) ? NEGLIGIBLE : "",
      scaleSaid: !shown ? `no map for “${what}”` : isNegligible(shown) ? "negligible everywhere" : scaleText(display),
      caption: method.caption,
    };
  }

  paint() {
    const view = super.paint();
    this.tiles.paint(view);
    return view;
  }

  save() {
    const view = this.view();
    const { picture } = this.surface;
    if (picture) saveCanvas(paintSheet(this.spec, view, this.palettes, picture), `compare ${view.what}`);
  }
}

/** Why some methods have no map here, and what to know of the scores; folded where it is long.
 * @param {CompareSpec} spec */
function notesOf(spec) {
  const missing = spec.refused.map(([name, why]) => make("li", "", [make("strong", "", [name]), `: ${why}`]));
  const list = make("ul", "lab-notes", [...missing, ...spec.notes.map((text) => make("li", "", [text]))]);
  const about = `Notes on these maps and scores (${missing.length + spec.notes.length})`;
  const parts = list.childElementCount > MOST_NOTES ? [make("details", "", [make("summary", "", [about]), list])] : [list];
  return make("div", "lab-remarks", parts);
}

/** @param {CompareDisplay} display */
function scaleText({ byRank, ownScale, range }) {
  if (byRank) return "colours by rank";
  return `${ownScale ? "colours of each map" : "one scale per method"}${range < 1 ? `, to ${Math.round(100 * range)}%` : ""}`;
}

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

/** @param {CompareSpec} spec @param {TilesView} view
 * @param {Record<string, Uint8Array>} palettes @param {CanvasImageSource} picture */
export function paintSheet(spec, view, palettes, picture) {
  const { margin, side, gap, columns, under, head } = SHEET;
  const { map } = spec;
  const k = Math.min(side / map.width, side / map.height);
  const [wide, high] = [Math.round(map.width * k), Math.round(map.height * k)];
  const lines = Math.ceil(view.order.length / columns);
  const canvas = blankCanvas(2 * margin + columns * (side + gap) - gap, head + lines * (high + under) + margin);
  const ctx = contextOf(canvas);
  const room = canvas.width - 2 * margin;
  ctx.fillStyle = "#ffffff";
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  write(ctx, spec.question, margin, 74, 34, "#111827", "600", room);
  write(ctx, spec.answer, margin, 118, 28, "#374151", "400", room);
  const by = view.sort ? `, by ${view.sort}` : "";
  write(ctx, `Maps of “${view.what}”${by} · ${spec.model} · seed ${spec.seed}`, margin, 154, 20, "#6b7280", "400", room);
  const { base, ground, pale } = groundsOf(map, picture, wide);
  const [inner, heat] = [blankCanvas(wide, high), blankCanvas(1, 1)];
  view.order.forEach((index, place) => {
    const { shown, palette, method, doubt } = view.tiles[index];
    const { opacity, smooth } = view.display;
    const x = margin + (place % columns) * (side + gap);
    const y = head + Math.floor(place / columns) * (high + under);
    const grey = !shown || palette.startsWith("grey");
    if (shown) paintHeat(heat, shown.levels, shown.table(palettes[palette]), map.rows, map.cols, smooth);
    const below = { base: grey ? pale : base, ground: grey ? pale : ground, heat: shown && heat };
    const look = { opacity, smooth, spotlight: false, selected: view.selected, dragging: [], hover: -1, cursor: -1 };
    paintScene(contextOf(inner), { map, ...below, ...look }, 1);
    ctx.drawImage(inner, x, y);
    const ink = doubt || !shown ? "#6b7280" : "#111827";
    const score = view.sort ? formatScore(scoreOf(spec, view.tiles[index], view.sort, view.stage)) : "";
    write(ctx, method.name, x, y + high + 24, 20, ink, "600", side - (score ? 74 : 0));
    write(ctx, score, x + wide - ctx.measureText(score).width, y + high + 24, 20, ink, "400", side);
    if (doubt) write(ctx, "not shown to beat random", x, y + high + 45, 16, ink, "400", side);
  });
  return canvas;
}

export const renderCompare = shows(Compare);
