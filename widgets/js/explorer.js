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
import { bytesOf, levelsOf, readMaps, readPalette, strongest } from "./maps.js";
import { legend, readout, topList } from "./parts.js";
import { fileName, Surface, widest } from "./surface.js";
import { patchSummary, summary, viewOf } from "./view.js";

/**
 * @typedef {import("./view.js").Spec} Spec
 * @typedef {import("./view.js").Reply} Reply
 * @typedef {import("./view.js").View} View
 * @typedef {import("./view.js").Part} Part
 * @typedef {import("./view.js").Display} Display
 * @typedef {{get: (name: string) => any, set: (name: string, value: any) => void, save_changes: () => void,
 *   send: (content: any) => void, on: (name: string, call: () => void) => void,
 *   off: (name: string, call: () => void) => void}} Model
 */

const QUICK = 0.1; // of all patches, for the two quick selections
const HEARD = ["selected", "word", "method", "layer", "reply"].map((name) => `change:${name}`);

class Explorer {
  /** @param {Model} model @param {HTMLElement} el */
  constructor(model, el) {
    this.model = model;
    this.stop = new AbortController();
    this.refresh = this.refresh.bind(this);
    this.spec = /** @type {Spec} */ (model.get("spec"));
    this.map = this.spec.map;
    this.maps = readMaps(model.get("maps"), model.get("scales"), this.map.rows * this.map.cols);
    const palettes = Object.fromEntries(Object.entries(this.spec.palettes).map(([name, hex]) => [name, readPalette(hex)]));
    this.surface = new Surface(this.spec, this.maps, palettes, this.refresh);
    const { opacity, smooth } = this.spec;
    this.display = /** @type {Display} */ ({ opacity, smooth, ownScale: false, spotlight: false });
    this.peek = { word: -1, method: -1 };
    this.pointing = /** @type {import("./gestures.js").Pointing} */ ({ hover: -1, cursor: -1, dragging: [] });
    this.pending = /** @type {{id: number, selected: number[], since: number} | null} */ (null);
    this.frame = 0;
    this.clock = 0;
    this.fallback = make("p", "lab-fallback");
    this.live = make("div", "lab-live", [], { "aria-live": "polite" });
    this.answers = answers(this.spec, this.stop.signal);
    this.parts = /** @type {Part[]} */ ([]);
    this.root = this.build(palettes);
    el.append(this.root);
    this.listen();
    this.refresh();
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
    const pickWord = (/** @type {number} */ i) => this.keep("word", i);
    const pickMethod = (/** @type {number} */ i) => this.keep("method", spec.methods[i].name);
    const words = add(wordChips(spec, pickWord, (word) => this.set(this.peek, { word }), signal));
    const methods = add(methodList(spec, pickMethod, (method) => this.set(this.peek, { method }), signal));
    const layer = add(layerControl(spec, (i) => this.keep("layer", i), signal));
    const display = add(displayControls(this.display, (change) => this.set(this.display, change), signal));
    const top = add(topList((hover) => this.set(this.pointing, { hover }), signal));
    const bar = add(selectionBar(spec.can_ask, quick, this.selectionActions(quick), signal));
    const about = `${spec.model} · seed ${spec.seed} · ${map.rows} × ${map.cols} patches`;
    const save = button("Save as PNG", () => this.save(), signal, "lab-link");
    const head = make("div", "lab-head", [make("span", "lab-about", [about]), save]);
    const question = make("div", "lab-question", [spec.question], { role: "heading", "aria-level": "2" });
    const figure = make("div", "lab-figure", [this.surface.canvas, add(readout()), add(legend(palettes)), this.fallback]);
    figure.style.maxWidth = `${widest(map)}px`;
    const body = make("div", "lab-body", [figure, make("div", "lab-side", [methods, layer, display, top])]);
    const all = [head, question, words, body, bar, this.answers.root, this.live];
    return make("div", "lab-explorer", [make("div", "lab-card", all, { role: "group", "aria-label": "Patch explorer" })]);
  }

  listen() {
    const { signal } = this.stop;
    for (const kind of ["keydown", "keyup", "keypress"]) {
      // JupyterLab's command mode would take "d d" as "delete the cell"
      this.root.addEventListener(kind, (event) => event.stopPropagation(), { signal });
    }
    const host = {
      selected: () => this.selected,
      select: (/** @type {Set<number>} */ patches) => this.select(patches),
      point: (/** @type {object} */ change) => this.set(this.pointing, change),
      say: (/** @type {number} */ patch) => setText(this.live, patchSummary(this.view(), patch)),
    };
    pointerGestures(this.surface.canvas, this.map, host, signal);
    keyboardGestures(this.surface.canvas, this.map, host, signal);
    for (const name of HEARD) this.model.on(name, this.refresh);
    this.clock = setInterval(() => this.pending && this.refresh(), 1000);
    this.surface.load(new Blob([bytesOf(this.model.get("picture")).slice()], { type: this.spec.picture }));
  }

  close() {
    this.stop.abort();
    for (const name of HEARD) this.model.off(name, this.refresh);
    clearInterval(this.clock);
    cancelAnimationFrame(this.frame);
    this.frame = -1; // a late event asks for no further frame
    this.surface.close();
    this.root.remove();
  }

  // -- state ---------------------------------------------------------------------------------

  /** Change state that stays in the page, and repaint.
   * @template {object} T @param {T} state @param {Partial<T>} change */
  set(state, change) {
    Object.assign(state, change);
    this.refresh();
  }

  /** Change state that Python hears of.
   * @param {string} name @param {any} value */
  keep(name, value) {
    this.peek = { word: -1, method: -1 };
    this.model.set(name, value);
    this.model.save_changes();
    this.refresh();
    setText(this.live, summary(this.view()));
  }

  get selected() {
    return new Set(/** @type {number[]} */ (this.model.get("selected")));
  }

  /** @param {Set<number>} patches */
  select(patches) {
    this.model.set("selected", sorted(patches));
    this.model.save_changes();
    this.refresh();
  }

  /** @param {number} quick @returns {import("./controls.js").SelectionActions} */
  selectionActions(quick) {
    const cells = Array.from({ length: this.maps.cells }, (_, i) => i).filter((patch) => onPicture(this.map, patch));
    return {
      strongest: () => {
        const { found } = this.view();
        if (!found) return;
        const order = strongest(levelsOf(this.maps, found.index), this.maps.cells);
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
    setText(this.live, "Asking again.");
    this.refresh();
  }

  /** @returns {View} */
  view() {
    const { model, peek, pointing } = this;
    const [word, method, layer] = ["word", "method", "layer"].map((name) => model.get(name));
    return viewOf(this.spec, this.maps, {
      word,
      method,
      layer,
      selected: this.selected,
      peekWord: peek.word,
      peekMethod: peek.method,
      focus: pointing.hover >= 0 ? pointing.hover : pointing.cursor,
      display: this.display,
      busy: this.pending !== null,
      mean: this.surface.mean,
    });
  }

  // -- painting ------------------------------------------------------------------------------

  /** Repaint with the next frame, once however often this is called before it. */
  refresh() {
    if (this.frame !== 0) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.settle();
      const view = this.view();
      this.surface.paint(view, this.pointing);
      for (const part of this.parts) part.update(view);
      setText(this.fallback, view.said);
    });
  }

  /** Show what came of asking again. */
  settle() {
    const reply = /** @type {Reply} */ (this.model.get("reply"));
    const mine = this.pending !== null && reply.id === this.pending.id;
    if (mine && reply.state !== "busy") {
      this.pending = null;
      const failed = `Asking again failed. ${reply.message ?? ""}`;
      setText(this.live, reply.state === "done" ? `New answer: ${reply.answer}` : failed);
    }
    const waited = this.pending ? Math.floor((performance.now() - this.pending.since) / 1000) : 0;
    const busy = this.pending && { state: "busy", selected: this.pending.selected, heard: mine };
    this.answers.show(busy || reply, waited);
  }

  save() {
    const view = this.view();
    this.surface.paint(view, this.pointing);
    this.surface.figure(this.spec, view).toBlob((file) => {
      if (!file) return;
      const url = URL.createObjectURL(file);
      make("a", "", [], { href: url, download: fileName(view.title) }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000); // the browser needs it until the download began
    });
  }
}

/** What anywidget calls for each view; gives back its clean-up.
 * @param {{model: Model, el: HTMLElement}} host */
function render({ model, el }) {
  const explorer = new Explorer(model, el);
  return () => explorer.close();
}

export default { render };
