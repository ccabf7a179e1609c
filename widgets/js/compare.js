// @ts-check
/**
 * CompareView: which map to trust. Every method's map of the same target, over the same picture.
 *
 * Maps arrive once; targets, order, colours and the enlarged map change here and ask Python nothing.
 * Python hears of what is kept: `target`, `method` (the enlarged one), `sort`, `selected`.
 */

import { wordChips } from "./chips.js";
import { aboutMap, scoreLines } from "./compare_stage.js";
import { paintSheet } from "./compare_sheet.js";
import { Tiles } from "./compare_tiles.js";
import { ALIKE, orderOf, tilesOf, whatOf } from "./compare_view.js";
import { button, choices, make, setText, slider } from "./dom.js";
import { keyboardGestures, pointerGestures } from "./gestures.js";
import { bytesOf, readMaps, readPalettes } from "./maps.js";
import { Panel } from "./panel.js";
import { legend, readout, topList } from "./parts.js";
import { saveCanvas, Surface, widest } from "./surface.js";
import { patchSummary, summary } from "./view.js";

/**
 * @typedef {import("./compare_view.js").CompareSpec} CompareSpec
 * @typedef {import("./compare_view.js").CompareDisplay} CompareDisplay
 * @typedef {import("./compare_view.js").Tile} Tile
 * @typedef {import("./view.js").MapView} MapView
 * @typedef {ReturnType<Compare["view"]>} CompareState
 */

const LEAST_RANGE = 5; // per cent
const MOST_NOTES = 3; // shown without being asked for

class Compare extends Panel {
  /** @param {import("./panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["target", "method", "sort"]);
    this.spec = /** @type {CompareSpec} */ (model.get("spec"));
    const { map, opacity, smooth } = this.spec;
    this.maps = readMaps(model.get("maps"), model.get("scales"), map.rows * map.cols);
    this.palettes = readPalettes(this.spec.palettes);
    this.display = /** @type {CompareDisplay} */ ({ opacity, smooth, spotlight: false, ownScale: true, byRank: false, range: 1 });
    this.peek = { target: -1 };
    this.worstFirst = false;
    this.kept = { key: "", tiles: /** @type {Tile[]} */ ([]) };
    this.surface = new Surface(map, this.palettes, this.refresh);
    const { signal } = this.stop;
    const host = {
      enlarge: (/** @type {number} */ index) => this.choose("method", this.spec.methods[index].name),
      point: (/** @type {number} */ hover) => this.point({ hover }),
    };
    this.tiles = new Tiles(this.spec, this.palettes, host, this.refresh, signal);
    this.parts = /** @type {{update: (view: any) => void}[]} */ ([]);
    this.open(this.build(), el);
    this.listen();
    this.load();
  }

  build() {
    const { spec } = this;
    const { signal } = this.stop;
    const add = (/** @type {{root: HTMLElement, update: (view: any) => void}} */ part) => {
      this.parts.push(part);
      return part.root;
    };
    const peek = (/** @type {number} */ target) => this.set(this.peek, { target });
    const chips = add(wordChips(/** @type {any} */ (spec), (i) => this.choose("target", i), peek, signal));
    chips.setAttribute("aria-label", "What is explained");
    const figure = make("div", "lab-figure", [this.surface.canvas, add(readout()), add(legend(this.palettes))]);
    figure.style.maxWidth = `${widest(spec.map)}px`;
    const side = [add(aboutMap(spec)), add(scoreLines(spec)), add(topList((hover) => this.point({ hover }), signal))];
    const stage = make("div", "lab-stage", [figure, make("div", "lab-side", side)]);
    const { rows, cols } = spec.map;
    const about = `${spec.model} · seed ${spec.seed} · ${rows} × ${cols} patches · ${spec.methods.length} methods`;
    const save = button("Save as PNG", () => this.save(), signal, "lab-link");
    const head = make("div", "lab-head", [make("span", "lab-about", [about]), save]);
    const question = make("div", "lab-question", [spec.question], { role: "heading", "aria-level": "2" });
    const notes = notesOf(spec);
    const bars = [add(this.orderBar()), add(this.colorBar())];
    const all = [head, question, chips, stage, ...bars, this.tiles.root, notes, this.live];
    const card = make("div", "lab-card", all, { role: "group", "aria-label": "Compare methods" });
    return make("div", "lab-widget lab-compare", [card]);
  }

  /** By which score the maps are ordered, and which end comes first. */
  orderBar() {
    const { spec } = this;
    const { signal } = this.stop;
    const names = ["", ...spec.scores.map((score) => score.name), ...(spec.agreement ? [ALIKE] : [])];
    const items = names.map((name) => ({ name: name || "as given", content: [name || "as given"] }));
    const by = choices({ label: "Sort by", className: "lab-pills", items, pick: (i) => this.choose("sort", names[i]), signal });
    const ends = ["Best first", "Worst first"].map((name) => ({ name, content: [name] }));
    const pick = (/** @type {number} */ i) => this.set(/** @type {any} */ (this), { worstFirst: i === 1 });
    const way = choices({ label: "Order", className: "lab-pair", items: ends, pick, signal });
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
    const percent = { min: LEAST_RANGE, max: 100, step: 5, value: 100, signal };
    const range = slider({ ...percent, label: "Colour range", input: (value) => this.set(this.display, { range: value / 100 }) });
    const value = Math.round(100 * this.display.opacity);
    const input = (/** @type {number} */ share) => this.set(this.display, { opacity: share / 100 });
    const opacity = slider({ ...percent, label: "Opacity", min: 0, value, input });
    const pair = (/** @type {string} */ label, /** @type {string[]} */ names, /** @type {(second: boolean) => void} */ pick) => {
      const items = names.map((name) => ({ name, content: [name] }));
      return choices({ label, className: "lab-pair", items, pick: (i) => pick(i === 1), signal });
    };
    const scale = pair("Scale", ["Each map", "Each method"], (second) => this.set(this.display, { ownScale: !second }));
    const paint = pair("Colours by", ["Value", "Rank"], (byRank) => this.set(this.display, { byRank }));
    const look = pair("Look", ["Patches", "Smooth"], (smooth) => this.set(this.display, { smooth }));
    return {
      root: make("div", "lab-bar-row", [range.root, opacity.root, paint.root, scale.root, look.root]),
      update: (/** @type {CompareState} */ { display }) => {
        const share = `${Math.round(100 * display.range)}%`;
        setText(range.output, display.byRank ? `top ${share}` : share);
        setText(opacity.output, `${Math.round(100 * display.opacity)}%`);
        paint.show(Number(display.byRank), -1);
        scale.show(Number(!display.ownScale), -1);
        scale.root.classList.toggle("lab-unused", display.byRank);
        look.show(Number(display.smooth), -1);
      },
    };
  }

  listen() {
    const { signal } = this.stop;
    const host = {
      selected: () => this.selected,
      select: (/** @type {Set<number>} */ patches) => this.select(patches),
      point: (/** @type {object} */ change) => this.point(change),
      say: (/** @type {number} */ patch) => this.say(patchSummary(this.view(), patch)),
    };
    pointerGestures(this.surface.canvas, this.spec.map, host, signal);
    keyboardGestures(this.surface.canvas, this.spec.map, host, signal);
  }

  async load() {
    await this.surface.load(new Blob([bytesOf(this.model.get("picture")).slice()], { type: this.spec.picture }));
    if (this.surface.picture) this.tiles.show(this.surface.picture);
  }

  close() {
    super.close();
    this.tiles.close();
    this.surface.close();
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
    const { spec, display, peek } = this;
    const chip = peek.target >= 0 ? peek.target : this.model.get("target");
    const key = JSON.stringify([chip, display]);
    if (key !== this.kept.key) this.kept = { key, tiles: tilesOf(spec, this.maps, chip, display) };
    const { tiles } = this.kept;
    const name = this.model.get("method");
    const stage = Math.max(
      0,
      spec.methods.findIndex((method) => method.name === name),
    );
    const sort = /** @type {string} */ (this.model.get("sort"));
    const { shown, palette, method } = tiles[stage];
    const what = whatOf(spec, chip);
    return {
      ...{ tiles, stage, sort, what, chip, word: this.model.get("target"), display, map: spec.map, shown, palette },
      order: orderOf(spec, tiles, sort, this.worstFirst, stage),
      focus: this.focus,
      selected: this.selected,
      mean: this.surface.mean,
      title: `${method.name} · “${what}”`,
      said: shown ? "" : `${method.name} has no map for “${what}”.`,
      scaleSaid: shown ? scaleText(display) : `no map for “${what}”`,
      caption: method.caption,
    };
  }

  paint() {
    const view = this.view();
    this.surface.paint(view, this.pointing);
    this.tiles.paint(view);
    for (const part of this.parts) part.update(view);
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

/** Shows a view; gives back its clean-up.
 * @param {{model: import("./panel.js").Model, el: HTMLElement}} host */
export function renderCompare({ model, el }) {
  const compare = new Compare(model, el);
  return () => compare.close();
}
