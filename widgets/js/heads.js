// @ts-check
/**
 * HeadGrid: which heads look where. A layer x head matrix of attention on the picture, the map of the head pointed at,
 * and for patches that are pointed at or selected: which heads and which words of the answer look at them.
 *
 * All maps are in the page. Python hears of what is kept: `word`, `layer`, `head`, `selected`.
 */
/* TODO 
 * Two lists beside the matrix: the heads that look most, and how much each word looks, over all heads. They say in
 * words what the colours say, and each line can be pointed at and chosen.
 */

import { blankCanvas, contextOf } from "./shared/canvas.js";
import { button, choices, make, setText, slider } from "./shared/dom.js";
import { keyboardGestures, pointerGestures } from "./shared/gestures.js";
import { bytesOf, readPalettes } from "./shared/maps.js";
import { Panel } from "./shared/panel.js";
import { legend, readout, wordChips } from "./shared/parts.js";
import { saveCanvas, Surface, widest } from "./shared/surface.js";
import { patchSummary, summary } from "./shared/view.js";
import {
  headMap,
  headName,
  layerMeans,
  Matrix,
  onWhat,
  readHeads,
  shareText,
  spentOn,
  topHeads,
  wordName,
} from "./heads_matrix.js";

/**
 * @typedef {import("./heads_matrix.js").HeadsSpec} HeadsSpec
 * @typedef {import("./heads_matrix.js").At} At
 * @typedef {ReturnType<HeadGrid["view"]>} HeadsState
 * @typedef {{best: (At & {value: number})[], words: {share: number, best: At & {value: number}}[], chip: number, on: string,
 *   what: string}} ListsView
 */

const TOP_HEADS = 5;

class HeadGrid extends Panel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["word", "layer", "head"]);
    this.spec = /** @type {HeadsSpec} */ (model.get("spec"));
    this.all = readHeads(model.get("maps"), model.get("scales"), this.spec);
    this.palettes = readPalettes(this.spec.palettes);
    const { layers, heads, map, opacity } = this.spec;
    this.display = { opacity, smooth: false, spotlight: false, ownScale: true };
    this.peek = { word: -1, at: /** @type {At | null} */ (null) };
    this.shown = /** @type {{key: string, map: import("./shared/maps.js").Shown | null}} */ ({ key: "", map: null });
    this.kept = { key: "", high: 0, spent: /** @type {Float32Array[]} */ ([]) };
    this.surface = new Surface(map, this.palettes, this.refresh);
    const host = {
      hover: (/** @type {At | null} */ at) => this.set(this.peek, { at }),
      pick: (/** @type {At} */ at) => this.pick(at),
      kept: () => this.at,
    };
    this.matrix = new Matrix(layers, heads, host, this.refresh, this.stop.signal);
    this.parts = /** @type {{update: (view: any) => void}[]} */ ([]);
    this.open(this.build(), el);
    this.listen();
    this.surface.load(new Blob([bytesOf(model.get("picture")).slice()], { type: this.spec.picture }));
  }

  build() {
    const { spec } = this;
    const { signal } = this.stop;
    const add = (/** @type {{root: HTMLElement, update: (view: any) => void}} */ part) => {
      this.parts.push(part);
      return part.root;
    };
    const peekWord = (/** @type {number} */ word) => this.set(this.peek, { word });
    const chips = add(wordChips(/** @type {any} */ (spec), (i) => this.choose("word", i), peekWord, signal));
    const figure = make("div", "lab-figure", [this.surface.canvas, add(readout()), add(legend(this.palettes))]);
    figure.style.maxWidth = `${widest(spec.map)}px`;
    const hoverHead = (/** @type {At | null} */ at) => this.set(this.peek, { at });
    const heads = add(headList(TOP_HEADS, hoverHead, (at) => this.pick(at), signal));
    const words = add(wordList(spec, peekWord, (i) => this.choose("word", i), signal));
    const grid = make("div", "lab-grid", [add(this.matrixHead()), this.matrix.canvas]);
    const left = make("div", "lab-side", [grid, words]);
    const right = make("div", "lab-side", [figure, add(this.controls()), heads]);
    const sizes = `${spec.layers} layers × ${spec.heads} heads · ${spec.map.rows} × ${spec.map.cols} patches`;
    const about = `${spec.model} · seed ${spec.seed} · ${sizes}`;
    const save = button("Save as PNG", () => this.save(), signal, "lab-link");
    const head = make("div", "lab-head", [make("span", "lab-about", [about]), save]);
    const question = make("div", "lab-question", [spec.question], { role: "heading", "aria-level": "2" });
    const notes = make("ul", "lab-notes", spec.notes.map((text) => make("li", "", [text])));
    const all = [head, question, chips, make("div", "lab-heads-body", [left, right]), notes, this.live];
    const card = make("div", "lab-card", all, { role: "group", "aria-label": "Attention heads" });
    return make("div", "lab-widget lab-heads", [card]);
  }

  /** What the matrix counts, and its colours. */
  matrixHead() {
    const strip = blankCanvas(256, 1);
    strip.className = "lab-strip";
    strip.setAttribute("aria-hidden", "true");
    const ctx = contextOf(strip);
    const colors = this.palettes.sequential;
    for (let i = 0; i < 256; i++) {
      ctx.fillStyle = `rgb(${colors[4 * i]}, ${colors[4 * i + 1]}, ${colors[4 * i + 2]})`;
      ctx.fillRect(i, 0, 1, 1);
    }
    const title = make("span", "lab-legend-title");
    const cell = make("span", "lab-legend-scale");
    const high = make("span", "lab-high");
    const ends = make("div", "lab-ends", [make("span", "lab-low", ["0%"]), make("span", ""), high]);
    return {
      root: make("div", "lab-legend lab-matrix-head", [make("div", "lab-legend-head", [title, cell]), strip, ends]),
      update: (/** @type {HeadsState} */ view) => {
        setText(title, `“${view.what}” on ${view.on}`);
        setText(cell, `${headName(view.at)}: ${shareText(view.cell)}`);
        setText(high, shareText(view.high));
      },
    };
  }

  /** Opacity, and whether each head's map has colours of its own. */
  controls() {
    const { signal } = this.stop;
    const items = ["This head", "All heads"].map((name) => ({ name, content: [name] }));
    const pick = (/** @type {number} */ i) => this.set(this.display, { ownScale: i === 0 });
    const scale = choices({ label: "Scale", className: "lab-pair", items, pick, signal });
    const value = Math.round(100 * this.display.opacity);
    const input = (/** @type {number} */ percent) => this.set(this.display, { opacity: percent / 100 });
    const opacity = slider({ label: "Opacity", min: 0, max: 100, step: 5, value, input, signal });
    const clear = button("Clear", () => this.select(new Set()), signal);
    return {
      root: make("div", "lab-bar-row", [opacity.root, scale.root, clear]),
      update: (/** @type {HeadsState} */ { display, selected }) => {
        setText(opacity.output, `${Math.round(100 * display.opacity)}%`);
        scale.show(Number(!display.ownScale), -1);
        clear.disabled = !selected.size;
      },
    };
  }

  listen() {
    const { signal } = this.stop;
    const host = {
      selected: () => this.selected,
      select: (/** @type {Set<number>} */ patches) => this.select(patches),
      point: (/** @type {object} */ change) => this.point(change),
      say: (/** @type {number} */ patch) => this.say(`${patchSummary(this.view(), patch)}. ${this.sayWords()}`),
    };
    pointerGestures(this.surface.canvas, this.spec.map, host, signal);
    keyboardGestures(this.surface.canvas, this.spec.map, host, signal);
  }

  close() {
    super.close();
    this.matrix.close();
    this.surface.close();
  }

  /** @returns {At} */
  get at() {
    return { layer: this.model.get("layer"), head: this.model.get("head") };
  }

  /** @param {At} at */
  pick(at) {
    this.peek.at = null;
    this.model.set("layer", at.layer);
    this.keep("head", at.head);
    this.say(summary(this.view()));
  }

  /** @param {string} name @param {any} value */
  choose(name, value) {
    this.peek = { word: -1, at: null };
    this.keep(name, value);
    this.say(summary(this.view()));
  }

  /** Which words look at what is pointed at or selected, for a screen reader. */
  sayWords() {
    const { words, on } = this.view();
    const said = words.map(({ share }, i) => `${wordName(this.spec, i)} ${shareText(share)}`);
    return `Attention on ${on}, mean over all heads: ${said.join(", ")}.`;
  }

  /** What every word's heads spend on the patches in question; the same until those change.
   * @param {number[]} patches */
  spent(patches) {
    const key = patches.join();
    if (key !== this.kept.key || !this.kept.spent.length) {
      const spent = this.spec.chips.map((_, word) => spentOn(this.all, word, patches));
      const high = spent.reduce((top, one) => one.reduce((a, b) => Math.max(a, b), top), 0);
      this.kept = { key, spent, high };
    }
    return this.kept;
  }

  view() {
    const { spec, all, display, palettes, peek, focus, selected } = this;
    const picked = this.model.get("word");
    const word = peek.word >= 0 ? peek.word : picked;
    const at = peek.at ?? this.at;
    const pointed = focus >= 0 && !selected.size;
    const patches = pointed ? [focus] : [...selected];
    const { spent, high, key } = this.spent(patches);
    const own = spent[word];
    const means = layerMeans(own, spec.heads);
    const top = display.ownScale ? 0 : this.highest(word);
    const words = spent.map((one) => {
      const [best] = topHeads(one, spec.heads, 1);
      return { share: one.reduce((a, b) => a + b, 0) / one.length, best };
    });
    return {
      ...{ map: spec.map, display, palette: "sequential", mean: this.surface.mean, focus, selected, at, words, high, said: "" },
      ...{ word: picked, chip: word, what: wordName(spec, word), on: onWhat(patches, pointed) },
      shown: this.mapOf(word, at, top),
      cell: at.head < 0 ? means[at.layer] : own[at.layer * spec.heads + at.head],
      best: topHeads(own, spec.heads, TOP_HEADS),
      title: `${headName(at)} · “${wordName(spec, word)}”`,
      scaleSaid: display.ownScale ? "colours of this map alone" : "one colour scale for all heads",
      caption: `attention of ${headName(at)}`,
      matrix: { key: `${word} ${key}`, spent: own, means, high, colors: palettes.sequential, kept: this.at, hover: peek.at },
    };
  }

  /** The map of a head, made once while it is shown. @param {number} word @param {At} at @param {number} top */
  mapOf(word, at, top) {
    const key = [word, at.layer, at.head, top].join();
    if (key !== this.shown.key) this.shown = { key, map: headMap(this.all, word, at, top) };
    return this.shown.map;
  }

  /** The highest value of any head's map of a word. @param {number} word */
  highest(word) {
    const count = this.spec.layers * this.spec.heads;
    return this.all.peaks.subarray(word * count, (word + 1) * count).reduce((a, b) => Math.max(a, b), 0);
  }

  paint() {
    const view = this.view();
    this.surface.paint(view, this.pointing);
    this.matrix.paint(view.matrix);
    for (const part of this.parts) part.update(view);
  }

  save() {
    const view = this.view();
    this.surface.paint(view, this.pointing);
    saveCanvas(this.surface.figure(this.spec, view), view.title);
  }
}

/** Shows a view; gives back its clean-up.
 * @param {{model: import("./shared/panel.js").Model, el: HTMLElement}} host */
export function renderHeads({ model, el }) {
  const heads = new HeadGrid(model, el);
  return () => heads.close();
}

/** The strongest heads for the word shown. Pointing at one shows its map, choosing keeps it.
 * @param {number} count @param {(at: At | null) => void} hover @param {(at: At) => void} pick @param {AbortSignal} signal */
export function headList(count, hover, pick, signal) {
  let best = /** @type {(At & {value: number})[]} */ ([]);
  const lines = Array.from({ length: count }, (_, i) => {
    const part = line(signal, () => pick(best[i]));
    part.root.addEventListener("pointerenter", () => hover(best[i]), { signal });
    part.root.addEventListener("pointerleave", () => hover(null), { signal });
    return part;
  });
  const label = make("h3", "lab-label");
  return {
    root: make("section", "lab-section", [label, make("ul", "lab-lines", lines.map(({ root }) => make("li", "", [root])))]),
    /** @param {ListsView} view */
    update(view) {
      best = view.best;
      setText(label, `Heads of “${view.what}” that look most at ${view.on}`);
      const most = best[0]?.value ?? 0;
      lines.forEach(({ root, name, value, fill }, i) => {
        root.hidden = i >= best.length;
        if (root.hidden) return;
        setText(name, headName(best[i]));
        setText(value, shareText(best[i].value));
        fill.style.transform = `scaleX(${most > 0 ? best[i].value / most : 0})`;
      });
    },
  };
}

/** Each word's attention on what is pointed at or selected, over all heads. Pointing at one shows it, choosing keeps it.
 * @param {HeadsSpec} spec @param {(word: number) => void} peek @param {(word: number) => void} pick
 * @param {AbortSignal} signal */
export function wordList(spec, peek, pick, signal) {
  const lines = spec.chips.map((_, i) => {
    const part = line(signal, () => pick(i));
    setText(part.name, wordName(spec, i));
    part.root.addEventListener("pointerenter", () => peek(i), { signal });
    part.root.addEventListener("pointerleave", () => peek(-1), { signal });
    return part;
  });
  const label = make("h3", "lab-label");
  const list = make("ul", "lab-lines", lines.map(({ root }) => make("li", "", [root])));
  return {
    root: make("section", "lab-section", [label, list]),
    /** @param {ListsView} view */
    update(view) {
      setText(label, `Words that look at ${view.on}, mean over all heads`);
      const most = Math.max(...view.words.map(({ share }) => share), 0);
      lines.forEach(({ root, value, fill, more }, i) => {
        const { share, best } = view.words[i];
        setText(value, shareText(share));
        setText(more, `most: ${headName(best)}, ${shareText(best.value)}`);
        fill.style.transform = `scaleX(${most > 0 ? share / most : 0})`;
        root.classList.toggle("lab-shown", i === view.chip);
      });
    },
  };
}

/** @param {AbortSignal} signal @param {() => void} press */
function line(signal, press) {
  const [name, value, more, fill] = ["lab-line-name", "lab-value", "lab-line-more", "lab-fill"].map((kind) => make("span", kind));
  const bar = make("span", "lab-bar", [fill], { "aria-hidden": "true" });
  const root = make("button", "lab-line", [name, bar, value, more], { type: "button" });
  root.addEventListener("click", press, { signal });
  return { root, name, value, more, fill };
}
