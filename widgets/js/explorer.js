// @ts-check
/**
 * PatchExplorer: which patches of the picture an answer came from.
 *
 * Maps arrive once; pointing at a word, method or layer repaints here and asks Python nothing. Python hears of what is
 * kept: `selected`, and `word`, `method`, `layer` when chosen. Opacity, look and colour scale never leave the page.
 *
 * Below the picture: how it is looked at, what is done with the selection, and what "ask again without these patches"
 * brought back: the old answer beside the new one, a sign of work while Python is busy, or the error in words.
 */

import { button, make, opacitySlider, section, segmented, setText, slider } from "./shared/dom.js";
import { onPicture, sorted } from "./shared/grid.js";
import { MapPanel } from "./shared/map_panel.js";
import { findMap, formatPercent, isNegligible, linearMap, NEGLIGIBLE, rangeOf, readMaps, strongest } from "./shared/maps.js";
import { shows } from "./shared/panel.js";
import { chipText, methodList, readout, topList, wordChips, wordContent } from "./shared/parts.js";
import { doubtful, paletteOf } from "./shared/view.js";

/**
 * @import { Display, Part, Reply, Spec, View } from "./shared/view.js"
 * @import { Model } from "./shared/panel.js"
 * @import { Word } from "./shared/parts.js"
 * @typedef {{strongest: () => void, random: () => void, clear: () => void, ask: () => void}} SelectionActions
 */

const PICTURE = 410; // CSS pixels: words, picture and what asks again are on one screen
const DOUBT = "Grey: this map was not shown to beat random ones.";
const QUICK = 0.1; // of all patches, for the two quick selections

class Explorer extends MapPanel {
  /** @param {Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["word", "method", "layer", "reply"]);
    const { map } = this.spec;
    this.maps = readMaps(model.get("maps"), model.get("scales"), map.rows * map.cols);
    const { opacity, smooth } = this.spec;
    this.display = /** @type {Display} */ ({ opacity, smooth, ownScale: false, spotlight: false });
    this.peek = { word: -1, method: -1 };
    this.pending = /** @type {{id: number, selected: number[], since: number} | null} */ (null);
    this.fallback = make("p", "lab-fallback");
    this.answers = answers(this.spec, this.stop.signal);
    this.open(this.build(), el);
    const clock = setInterval(() => this.pending && this.refresh(), 1000);
    this.stop.signal.addEventListener("abort", () => clearInterval(clock));
  }

  build() {
    const spec = /** @type {Spec} */ (this.spec);
    const { signal } = this.stop;
    const quick = Math.max(1, Math.round(QUICK * this.maps.cells));
    const pickWord = (/** @type {number} */ i) => this.choose("word", i);
    const pickMethod = (/** @type {number} */ i) => this.choose("method", spec.methods[i].name);
    const words = this.add(wordChips(spec, pickWord, (word) => this.set(this.peek, { word }), signal));
    const methods = this.add(methodList(spec, pickMethod, (method) => this.set(this.peek, { method }), signal));
    const layer = this.add(layerControl((i) => this.choose("layer", i), signal));
    const display = this.add(displayControls(this.display, (change) => this.set(this.display, change), signal));
    const top = this.add(topList((hover) => this.point({ hover }), signal));
    const bar = this.add(selectionBar(spec.can_ask, quick, this.selectionActions(quick), signal));
    const side = make("div", "lab-side", [methods, layer, top, display]);
    const body = make("div", "lab-body", [this.figure([this.fallback], readout(), PICTURE), side]);
    const text = { class: "lab-explorer", label: "Patch explorer", about: this.patchesText };
    return this.card(text, [words, body, bar, this.answers.root]);
  }

  /** Choose what is shown: Python hears of it, and so does a screen reader.
   * @param {string} name @param {any} value */
  choose(name, value) {
    this.peek = { word: -1, method: -1 };
    super.choose(name, value);
  }

  /** @param {number} quick @returns {SelectionActions} */
  selectionActions(quick) {
    const seen = (/** @type {number[]} */ patches) => patches.filter((patch) => onPicture(this.spec.map, patch));
    return {
      strongest: () => {
        const { shown } = this.view();
        if (!shown) return;
        this.select(new Set(seen(strongest(shown.levels, this.maps.cells)).slice(0, quick)));
      },
      random: () => {
        const order = seen([...Array(this.maps.cells).keys()]).map((patch) => ({ patch, at: Math.random() }));
        order.sort((a, b) => a.at - b.at);
        this.select(new Set(order.slice(0, quick).map(({ patch }) => patch)));
      },
      clear: () => this.select(new Set()),
      ask: () => this.ask(),
    };
  }

  ask() {
    const selected = sorted(this.selected);
    if (!selected.length || this.pending) return;
    const id = Math.floor(Math.random() * 2 ** 48); // tells this question's reply from an earlier one's
    this.pending = { id, selected, since: performance.now() };
    this.model.send({ kind: "ask", id, selected });
    this.say("Asking again.");
    this.refresh();
  }

  /** Which map is to be seen, in which colours, and the words that say so. @returns {View} */
  view() {
    const { model, peek, display, focus, selected } = this;
    const spec = /** @type {Spec} */ (this.spec);
    const pickedMethod = Math.max(0, spec.methods.map(({ name }) => name).indexOf(model.get("method")));
    const methodIndex = peek.method >= 0 ? peek.method : pickedMethod;
    const method = spec.methods[methodIndex];
    const word = /** @type {number} */ (model.get("word"));
    const chip = peek.word >= 0 ? peek.word : word;
    const layer = Math.min(model.get("layer"), method.layers.length - 1);
    const found = findMap(method, chip, layer);
    const [lo, hi] = found && display.ownScale ? rangeOf(this.maps, found.index, method.signed) : [method.lo, method.hi];
    const what = chipText(spec.chips[chip]);
    const doubt = doubtful(method, found);
    const shown = found && linearMap(this.maps, found.index, lo, hi, method.signed, method.floors?.[found.target] ?? 0);
    return {
      ...{ map: spec.map, method, methodIndex, pickedMethod, word, chip, layer, display, focus, selected },
      ...{ busy: this.pending !== null, mean: this.surface.mean },
      shown,
      palette: paletteOf(method.signed, doubt, display.spotlight),
      title: [method.name, `“${what}”`, method.layers.length > 1 ? method.layers[layer] : ""].filter(Boolean).join(" · "),
      said: [missing(method, found, what), doubt ? DOUBT : "", isNegligible(shown) ? NEGLIGIBLE : ""].filter(Boolean).join(" "),
      scaleSaid: display.ownScale ? "colours of this map alone" : "one colour scale for all words",
      caption: method.caption,
    };
  }

  // -- painting ------------------------------------------------------------------------------

  paint() {
    this.settle();
    const view = super.paint();
    setText(this.fallback, view.said);
    return view;
  }

  /** Show what came of asking again. */
  settle() {
    const reply = /** @type {Reply} */ (this.model.get("reply"));
    const mine = this.pending !== null && reply.id === this.pending.id;
    if (mine && reply.state !== "busy") {
      this.pending = null;
      const failed = `Asking again failed. ${reply.message ?? ""}`;
      this.say(reply.state === "done" ? `New answer: ${reply.answer}` : failed);
    }
    const waited = this.pending ? Math.floor((performance.now() - this.pending.since) / 1000) : 0;
    const busy = this.pending && { state: "busy", selected: this.pending.selected, heard: mine };
    this.answers.show(busy || reply, waited);
  }
}

/** What is said where a method has no map of its own for a word.
 * @param {import("./shared/maps.js").Method} method @param {import("./shared/maps.js").Found | null} found
 * @param {string} what */
function missing(method, found, what) {
  if (!found) return `${method.name} has no map for “${what}”.`;
  return found.own ? "" : `${method.name} has no map of its own for “${what}”: this is its map for the whole answer.`;
}

/** Opacity, patches or smooth, colours or the picture itself lit up, one scale or each map its own.
 * @param {Display} start @param {(change: Partial<Display>) => void} change @param {AbortSignal} signal @returns {Part} */
export function displayControls(start, change, signal) {
  const pair = (/** @type {string} */ label, /** @type {string[]} */ names, /** @type {(second: boolean) => void} */ pick) => {
    const group = segmented(label, names, (index) => pick(index === 1), signal);
    return { root: make("div", "lab-slider", [make("span", "lab-label", [label]), group.root]), show: group.show };
  };
  const opacity = opacitySlider(start, change, signal);
  const look = pair("Look", ["Patches", "Smooth"], (smooth) => change({ smooth }));
  const scale = pair("Scale", ["All words", "This map"], (ownScale) => change({ ownScale }));
  const paint = pair("Paint", ["Colour", "Spotlight"], (spotlight) => change({ spotlight }));
  return {
    root: section("Display", [opacity.root, look.root, paint.root, scale.root]),
    update({ display }) {
      opacity.show(display.opacity);
      look.show(Number(display.smooth), -1);
      scale.show(Number(display.ownScale), -1);
      paint.show(Number(display.spotlight), -1);
    },
  };
}

/** A slider over the layers of the method shown; absent where it has one map only.
 * @param {(layer: number) => void} pick @param {AbortSignal} signal @returns {Part} */
export function layerControl(pick, signal) {
  const { root: row, range, output } = slider({ label: "Layer", min: 0, max: 0, step: 1, value: 0, input: pick, signal });
  return {
    root: row,
    update({ method, layer }) {
      row.hidden = method.layers.length < 2;
      const last = String(method.layers.length - 1);
      if (range.max !== last) range.max = last;
      if (range.value !== String(layer)) range.value = String(layer);
      range.setAttribute("aria-valuetext", method.layers[layer]);
      setText(output, method.layers[layer]);
    },
  };
}

/** How many patches are selected, quick selections, and the question asked again.
 * @param {boolean} canAsk @param {number} quick @param {SelectionActions} act @param {AbortSignal} signal @returns {Part} */
export function selectionBar(canAsk, quick, act, signal) {
  const count = make("span", "lab-count");
  const clear = button("Clear", act.clear, signal);
  const ask = button("Ask again without these patches", act.ask, signal, "lab-button lab-primary");
  ask.hidden = !canAsk;
  const strongest = button(`Strongest ${quick}`, act.strongest, signal);
  const random = button(`Random ${quick}`, act.random, signal);
  random.title = "A control: as many patches, chosen without looking at any map";
  const tools = make("div", "lab-tools", [strongest, random, clear]);
  const root = make("div", "lab-selection", [count, tools, ask], { role: "group", "aria-label": "Selected patches" });
  return {
    root,
    update({ selected, map, busy, shown }) {
      setText(count, selected.size ? `${countText(selected.size)} of ${map.rows * map.cols} selected` : "No patches selected");
      strongest.disabled = !shown;
      clear.disabled = !selected.size;
      ask.disabled = !selected.size || busy;
      setText(ask, busy ? "Asking…" : "Ask again without these patches");
    },
  };
}

/** The old answer beside the one without the selected patches.
 * @param {Spec} spec @param {AbortSignal} signal @returns {{root: HTMLElement, show: (reply: Reply, waited: number) => void}} */
export function answers(spec, signal) {
  const root = make("div", "lab-answers", [], { role: "group", "aria-label": "Answers before and after" });
  const old = spec.chips.filter((chip) => chip.kind === "word");
  let shown = "";
  return {
    root,
    show(reply, waited) {
      const key = JSON.stringify([reply, waited]);
      if (key === shown) return;
      shown = key;
      root.hidden = !reply.state;
      if (reply.state === "busy") root.replaceChildren(waiting(reply, waited));
      else if (reply.state === "error") root.replaceChildren(failure(reply, signal));
      else if (reply.state === "done") {
        const words = reply.words ?? [];
        const same = reply.answer === spec.answer;
        const after = `Without ${countText(reply.selected.length)}`;
        const texts = [old, words].map((some) => some.map(({ text }) => text));
        const fresh = newWords(texts[0], texts[1]);
        root.replaceChildren(
          column("With every patch", old, spec.p, [], ""),
          column(after, words, reply.p ?? null, fresh, same ? "same answer" : "new answer"),
        );
      }
    },
  };
}

/** Which words of the new answer are not in the old one, in order (longest common subsequence).
 * @param {string[]} before @param {string[]} after */
export function newWords(before, after) {
  const long = Array.from({ length: before.length + 1 }, () => new Array(after.length + 1).fill(0));
  for (let i = before.length - 1; i >= 0; i--) {
    for (let j = after.length - 1; j >= 0; j--) {
      long[i][j] = before[i] === after[j] ? 1 + long[i + 1][j + 1] : Math.max(long[i + 1][j], long[i][j + 1]);
    }
  }
  const fresh = after.map(() => true);
  for (let i = 0, j = 0; i < before.length && j < after.length;) {
    if (before[i] === after[j]) {
      fresh[j] = false;
      i += 1;
      j += 1;
    } else if (long[i + 1][j] >= long[i][j + 1]) i += 1;
    else j += 1;
  }
  return fresh;
}

/** @param {number} count */
export function countText(count) {
  return count === 1 ? "1 patch" : `${count} patches`;
}

/** @param {string} title @param {Word[]} words @param {number | null} p @param {boolean[]} fresh @param {string} verdict */
function column(title, words, p, fresh, verdict) {
  const row = words.map((word, i) => make("span", fresh[i] ? "lab-said lab-new" : "lab-said", wordContent(word)));
  const whole = p === null ? "" : `probability of the whole answer ${formatPercent(p)}`;
  const head = make("div", "lab-column-head", [make("h3", "lab-label", [title]), make("span", "lab-verdict", [verdict])]);
  return make("div", "lab-column", [head, make("p", "lab-saying", row), make("p", "lab-caption", [whole])]);
}

/** @param {Reply} reply @param {number} waited */
function waiting(reply, waited) {
  const asked = `Asking again without ${countText(reply.selected.length)}`;
  const silent = reply.heard ? "" : " No word from Python yet; it may be busy or stopped.";
  return make("p", "lab-waiting", [
    make("span", "lab-spinner", [], { "aria-hidden": "true" }),
    waited < 2 ? `${asked}…` : `${asked}… ${waited} s.${waited < 5 ? "" : silent}`,
  ]);
}

/** @param {Reply} reply @param {AbortSignal} signal */
function failure(reply, signal) {
  const trace = make("pre", "lab-trace", [reply.trace ?? ""]);
  trace.hidden = true;
  const more = button("Show where", () => (trace.hidden = !trace.hidden), signal, "lab-link");
  const said = make("p", "", [reply.message ?? "The callback failed."]);
  return make("div", "lab-failure", [said, ...(reply.trace ? [more, trace] : [])], { role: "alert" });
}

export const renderExplorer = shows(Explorer);
