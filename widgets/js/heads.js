// @ts-check
/**
 * HeadGrid: which heads look where. A layer x head matrix of attention on the picture, the map of the head pointed at,
 * and for patches that are pointed at or selected: which heads and which words of the answer look at them, in two lists
 * that say in words what the colours say.
 *
 * All maps are in the page. Python hears of what is kept: `word`, `layer`, `head`, `selected`.
 */

import { blankCanvas, contextOf } from "./shared/canvas.js";
import { button, make, opacitySlider, segmented, setText } from "./shared/dom.js";
import { MapPanel, STAGE } from "./shared/map_panel.js";
import { shareText } from "./shared/maps.js";
import { shows } from "./shared/panel.js";
import { readout, wordChips } from "./shared/parts.js";
import { headMap, headName, layerMeans, Matrix, mean, onWhat, readHeads } from "./heads_matrix.js";
import { spentOn, topHeads, wordName } from "./heads_matrix.js";

/**
 * @import { At, HeadsSpec } from "./heads_matrix.js"
 * @typedef {ReturnType<HeadGrid["view"]>} HeadsState
 * @typedef {{best: (At & {value: number})[], words: {share: number, best: At & {value: number}}[], chip: number, on: string,
 *   what: string}} ListsView
 */

const TOP_HEADS = 5;

class HeadGrid extends MapPanel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["word", "layer", "head"]);
    this.all = readHeads(model.get("maps"), model.get("scales"), this.spec);
    const { layers, heads, opacity } = this.spec;
    this.display = { opacity, smooth: false, spotlight: false, ownScale: true };
    this.peek = { word: -1, at: /** @type {At | null} */ (null) };
    this.shown = /** @type {{key: string, map: import("./shared/maps.js").Shown | null}} */ ({ key: "", map: null });
    this.kept = { key: "", high: 0, spent: /** @type {Float32Array[]} */ ([]) };
    const host = {
      hover: (/** @type {At | null} */ at) => this.set(this.peek, { at }),
      pick: (/** @type {At | null} */ at) => at && this.pick(at),
      kept: () => this.at,
    };
    this.matrix = new Matrix(layers, heads, host, this.refresh, this.stop.signal);
    this.open(this.build(), el);
  }

  build() {
    const spec = /** @type {HeadsSpec} */ (this.spec);
    const { signal } = this.stop;
    const peekWord = (/** @type {number} */ word) => this.set(this.peek, { word });
    const pickWord = (/** @type {number} */ i) => this.choose("word", i);
    const hoverHead = (/** @type {At | null} */ at) => this.set(this.peek, { at });
    const chips = this.add(wordChips(/** @type {any} */ (spec), pickWord, peekWord, signal));
    const figure = this.figure([this.add(this.controls())], readout(), STAGE);
    const heads = this.add(headList(TOP_HEADS, hoverHead, (at) => this.pick(at), signal));
    const words = this.add(wordList(spec, peekWord, pickWord, signal));
    const grid = make("div", "lab-grid", [this.add(this.matrixHead()), this.matrix.canvas]);
    const lists = make("div", "lab-side lab-scroll lab-lists", [heads, words]);
    const notes = make("ul", "lab-notes", spec.notes.map((text) => make("li", "", [text])));
    const about = `${spec.layers} layers × ${spec.heads} heads · ${this.patchesText}`;
    const text = { class: "lab-heads lab-screen", label: "Attention heads", about };
    return this.card(text, [chips, make("div", "lab-body", [grid, figure, lists]), notes]);
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
    const pick = (/** @type {number} */ i) => this.set(this.display, { ownScale: i === 0 });
    const scale = segmented("Scale", ["This head", "All heads"], pick, signal);
    const opacity = opacitySlider(this.display, (change) => this.set(this.display, change), signal);
    const clear = button("Clear", () => this.select(new Set()), signal);
    return {
      root: make("div", "lab-bar-row", [opacity.root, scale.root, clear]),
      update: (/** @type {HeadsState} */ { display, selected }) => {
        opacity.show(display.opacity);
        scale.show(Number(!display.ownScale), -1);
        clear.disabled = !selected.size;
      },
    };
  }

  /** @returns {At} */
  get at() {
    return { layer: this.model.get("layer"), head: this.model.get("head") };
  }

  /** @param {At} at */
  pick(at) {
    this.peek.at = null;
    this.model.set("layer", at.layer);
    super.choose("head", at.head);
  }

  /** @param {string} name @param {any} value */
  choose(name, value) {
    this.peek = { word: -1, at: null };
    super.choose(name, value);
  }

  /** The patch, and which words look at what is pointed at or selected. @param {number} patch */
  spoken(patch) {
    const { words, on } = this.view();
    const shares = words.map(({ share }, i) => `${wordName(this.spec, i)} ${shareText(share)}`);
    return `${super.spoken(patch)}. Attention on ${on}, mean over all heads: ${shares.join(", ")}.`;
  }

  /** What every word's heads spend on the patches in question; the same until those change.
   * @param {number[]} patches */
  spent(patches) {
    const key = patches.join();
    if (key !== this.kept.key || !this.kept.spent.length) {
      const spent = Array.from({ length: this.all.words }, (_, word) => spentOn(this.all, word, patches));
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
      return { share: mean(one), best };
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
    const view = super.paint();
    this.matrix.paint(view.matrix);
    return view;
  }
}

/** The strongest heads for the word shown. Pointing at one shows its map, choosing keeps it.
 * @param {number} count @param {(at: At | null) => void} hover @param {(at: At) => void} pick @param {AbortSignal} signal */
export function headList(count, hover, pick, signal) {
  let best = /** @type {(At & {value: number})[]} */ ([]);
  const peek = (/** @type {number} */ i) => hover(best[i] ?? null);
  const { root, label, lines } = lineList(count, peek, (i) => pick(best[i]), signal);
  return {
    root,
    /** @param {ListsView} view */
    update(view) {
      best = view.best;
      setText(label, `Heads of “${view.what}” that look most at ${view.on}`);
      const most = best[0]?.value ?? 0;
      lines.forEach((line, i) => {
        line.root.hidden = i >= best.length;
        if (!line.root.hidden) fillLine(line, headName(best[i]), best[i].value, most);
      });
    },
  };
}

/** Each word's attention on what is pointed at or selected, over all heads. Pointing at one shows it, choosing keeps it.
 * @param {HeadsSpec} spec @param {(word: number) => void} peek @param {(word: number) => void} pick
 * @param {AbortSignal} signal */
export function wordList(spec, peek, pick, signal) {
  const { root, label, lines } = lineList(spec.chips.length, peek, pick, signal);
  return {
    root,
    /** @param {ListsView} view */
    update(view) {
      setText(label, `Words that look at ${view.on}, mean over all heads`);
      const most = Math.max(...view.words.map(({ share }) => share), 0);
      lines.forEach((line, i) => {
        const { share, best } = view.words[i];
        fillLine(line, wordName(spec, i), share, most);
        setText(line.more, `most: ${headName(best)}, ${shareText(best.value)}`);
        line.root.classList.toggle("lab-shown", i === view.chip);
      });
    },
  };
}

/** Lines to point at (-1: no longer) and to choose. @param {number} count @param {(index: number) => void} peek
 * @param {(index: number) => void} pick @param {AbortSignal} signal */
function lineList(count, peek, pick, signal) {
  const kinds = ["lab-line-name", "lab-value", "lab-line-more", "lab-fill"];
  const lines = Array.from({ length: count }, (_, i) => {
    const [name, value, more, fill] = kinds.map((kind) => make("span", kind));
    const bar = make("span", "lab-bar", [fill], { "aria-hidden": "true" });
    const root = make("button", "lab-line", [name, bar, value, more], { type: "button" });
    root.addEventListener("click", () => pick(i), { signal });
    root.addEventListener("pointerenter", () => peek(i), { signal });
    root.addEventListener("pointerleave", () => peek(-1), { signal });
    return { root, name, value, more, fill };
  });
  const label = make("h3", "lab-label");
  const list = make("ul", "lab-lines", lines.map(({ root }) => make("li", "", [root])));
  return { root: make("section", "lab-section", [label, list]), label, lines };
}

/** @param {{name: Node, value: Node, fill: HTMLElement}} line @param {string} name @param {number} share @param {number} most */
function fillLine(line, name, share, most) {
  setText(line.name, name);
  setText(line.value, shareText(share));
  line.fill.style.transform = `scaleX(${most > 0 ? share / most : 0})`;
}

export const renderHeads = shows(HeadGrid);
