// @ts-check
/**
 * PatchExplorer: which patches of the picture an answer came from.
 *
 * Maps arrive once; pointing at a word, method or layer repaints here and asks Python nothing.
 * Python hears of what is kept: `selected`, and `word`, `method`, `layer` when chosen.
 * Opacity, look and colour scale never leave the page.
 */

import { answers } from "./answers.js";
import { methodList, wordChips } from "./chips.js";
import { displayControls, layerControl, selectionBar } from "./controls.js";
import { button, make, setText } from "./dom.js";
import { keyboardGestures, pointerGestures } from "./gestures.js";
import { onPicture, sorted } from "./grid.js";
import { bytesOf, readMaps, readPalettes, strongest } from "./maps.js";
import { Panel } from "./panel.js";
import { legend, readout, topList } from "./parts.js";
import { saveCanvas, Surface, widest } from "./surface.js";
import { patchSummary, summary, viewOf } from "./view.js";

/**
 * @typedef {import("./view.js").Spec} Spec
 * @typedef {import("./view.js").Reply} Reply
 * @typedef {import("./view.js").View} View
 * @typedef {import("./view.js").Part} Part
 * @typedef {import("./view.js").Display} Display
 * @typedef {import("./panel.js").Model} Model
 */

const QUICK = 0.1; // of all patches, for the two quick selections

class Explorer extends Panel {
  /** @param {Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["word", "method", "layer", "reply"]);
    this.spec = /** @type {Spec} */ (model.get("spec"));
    this.map = this.spec.map;
    this.maps = readMaps(model.get("maps"), model.get("scales"), this.map.rows * this.map.cols);
    const palettes = readPalettes(this.spec.palettes);
    this.surface = new Surface(this.map, palettes, this.refresh);
    const { opacity, smooth } = this.spec;
    this.display = /** @type {Display} */ ({ opacity, smooth, ownScale: false, spotlight: false });
    this.peek = { word: -1, method: -1 };
    this.pending = /** @type {{id: number, selected: number[], since: number} | null} */ (null);
    this.fallback = make("p", "lab-fallback");
    this.answers = answers(this.spec, this.stop.signal);
    this.parts = /** @type {Part[]} */ ([]);
    this.open(this.build(palettes), el);
    this.listen();
    this.clock = setInterval(() => this.pending && this.refresh(), 1000);
    this.surface.load(new Blob([bytesOf(model.get("picture")).slice()], { type: this.spec.picture }));
  }

  /** @param {Record<string, Uint8Array>} palettes */
  build(palettes) {
    const { spec, map } = this;
    const { signal } = this.stop;
    const quick = Math.max(1, Math.round(QUICK * map.rows * map.cols));
    const add = (/** @type {Part} */ part) => {
      this.parts.push(part);
      return part.root;
    };
    const pickWord = (/** @type {number} */ i) => this.choose("word", i);
    const pickMethod = (/** @type {number} */ i) => this.choose("method", spec.methods[i].name);
    const words = add(wordChips(spec, pickWord, (word) => this.set(this.peek, { word }), signal));
    const methods = add(methodList(spec, pickMethod, (method) => this.set(this.peek, { method }), signal));
    const layer = add(layerControl(spec, (i) => this.choose("layer", i), signal));
    const display = add(displayControls(this.display, (change) => this.set(this.display, change), signal));
    const top = add(topList((hover) => this.point({ hover }), signal));
    const bar = add(selectionBar(spec.can_ask, quick, this.selectionActions(quick), signal));
    const about = `${spec.model} · seed ${spec.seed} · ${map.rows} × ${map.cols} patches`;
    const save = button("Save as PNG", () => this.save(), signal, "lab-link");
    const head = make("div", "lab-head", [make("span", "lab-about", [about]), save]);
    const question = make("div", "lab-question", [spec.question], { role: "heading", "aria-level": "2" });
    const figure = make("div", "lab-figure", [this.surface.canvas, add(readout()), add(legend(palettes)), this.fallback]);
    figure.style.maxWidth = `${widest(map)}px`;
    const body = make("div", "lab-body", [figure, make("div", "lab-side", [methods, layer, display, top])]);
    const all = [head, question, words, body, bar, this.answers.root, this.live];
    const card = make("div", "lab-card", all, { role: "group", "aria-label": "Patch explorer" });
    return make("div", "lab-widget lab-explorer", [card]);
  }

  listen() {
    const { signal } = this.stop;
    const host = {
      selected: () => this.selected,
      select: (/** @type {Set<number>} */ patches) => this.select(patches),
      point: (/** @type {object} */ change) => this.point(change),
      say: (/** @type {number} */ patch) => this.say(patchSummary(this.view(), patch)),
    };
    pointerGestures(this.surface.canvas, this.map, host, signal);
    keyboardGestures(this.surface.canvas, this.map, host, signal);
  }

  close() {
    super.close();
    clearInterval(this.clock);
    this.surface.close();
  }

  /** Choose what is shown: Python hears of it, and so does a screen reader.
   * @param {string} name @param {any} value */
  choose(name, value) {
    this.peek = { word: -1, method: -1 };
    this.keep(name, value);
    this.say(summary(this.view()));
  }

  /** @param {number} quick @returns {import("./controls.js").SelectionActions} */
  selectionActions(quick) {
    const cells = Array.from({ length: this.maps.cells }, (_, i) => i).filter((patch) => onPicture(this.map, patch));
    return {
      strongest: () => {
        const { shown } = this.view();
        if (!shown) return;
        const order = strongest(shown.levels, this.maps.cells);
        this.select(new Set(order.filter((patch) => onPicture(this.map, patch)).slice(0, quick)));
      },
      random: () => {
        const order = cells.map((patch) => ({ patch, at: Math.random() })).sort((a, b) => a.at - b.at);
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

  /** @returns {View} */
  view() {
    const { model, peek } = this;
    const [word, method, layer] = ["word", "method", "layer"].map((name) => model.get(name));
    return viewOf(this.spec, this.maps, {
      word,
      method,
      layer,
      selected: this.selected,
      peekWord: peek.word,
      peekMethod: peek.method,
      focus: this.focus,
      display: this.display,
      busy: this.pending !== null,
      mean: this.surface.mean,
    });
  }

  // -- painting ------------------------------------------------------------------------------

  paint() {
    this.settle();
    const view = this.view();
    this.surface.paint(view, this.pointing);
    for (const part of this.parts) part.update(view);
    setText(this.fallback, view.said);
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

  save() {
    const view = this.view();
    this.surface.paint(view, this.pointing);
    saveCanvas(this.surface.figure(this.spec, view), view.title);
  }
}

/** Shows a view; gives back its clean-up.
 * @param {{model: Model, el: HTMLElement}} host */
export function renderExplorer({ model, el }) {
  const explorer = new Explorer(model, el);
  return () => explorer.close();
}
