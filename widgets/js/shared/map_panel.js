// @ts-check
/**
 * What widgets over one picture share: its canvas to point at and select on, a card with the question, parts that follow
 * the view, a figure to save. A widget says what is to be seen (`view`) and builds its own parts round the canvas.
 */

import { button, carded, make } from "./dom.js";
import { keyboardGestures, pointerGestures } from "./gestures.js";
import { bytesOf, readPalettes } from "./maps.js";
import { Panel } from "./panel.js";
import { legend, readout, told } from "./parts.js";
import { saveCanvas, Surface, widest } from "./surface.js";
import { patchSummary, summary } from "./view.js";

/**
 * @typedef {{root: HTMLElement, update: (view: any) => void}} AnyPart
 * @typedef {{class: string, label: string, about: string, tail?: Node[]}} CardText
 */

export const STAGE = 360; // CSS pixels of an enlarged picture: it is seen beside what is chosen from

export class MapPanel extends Panel {
  /** @param {import("./panel.js").Model} model @param {string[]} names what of the model is shown */
  constructor(model, names) {
    super(model, names);
    /** @type {any} each widget's own; all have a question, the picture's map and colours */
    this.spec = model.get("spec");
    this.palettes = readPalettes(this.spec.palettes);
    this.surface = new Surface(this.spec.map, this.palettes, this.refresh, this.stop.signal);
    this.parts = /** @type {AnyPart[]} */ ([]);
  }

  /** Put the finished root in the page, listen, and show the picture as soon as it is read.
   * @param {HTMLElement} root @param {HTMLElement} el */
  open(root, el) {
    super.open(root, el);
    this.listen();
    return this.surface.load(new Blob([bytesOf(this.model.get("picture")).slice()], { type: this.spec.picture }));
  }

  /** Point and select on the picture by mouse, touch and keyboard. */
  listen() {
    const host = {
      selected: () => this.selected,
      select: (/** @type {Set<number>} */ patches) => this.select(patches),
      point: (/** @type {object} */ change) => this.point(change),
      say: (/** @type {number} */ patch) => this.say(this.spoken(patch)),
    };
    pointerGestures(this.surface.canvas, this.spec.map, host, this.stop.signal);
    keyboardGestures(this.surface.canvas, this.spec.map, host, this.stop.signal);
  }

  /** What is to be seen; each widget has its own. @returns {any} */
  view() {}

  /** A part that is updated with every frame; its root. @param {AnyPart} part */
  add(part) {
    this.parts.push(part);
    return part.root;
  }

  /** The picture with what is read below it.
   * @param {Node[]} [below] @param {AnyPart} [line] the line on the patch pointed at
   * @param {number} [tallest] CSS pixels */
  figure(below = [], line = readout(), tallest = undefined) {
    const node = make("div", "lab-figure", [this.surface.canvas, this.add(line), this.add(legend(this.palettes)), ...below]);
    node.style.maxWidth = `${widest(this.spec.map, tallest)}px`;
    return node;
  }

  /** The whole widget: what was asked of which model, then its own parts. @param {CardText} text @param {Node[]} parts */
  card(text, parts) {
    const { spec } = this;
    const save = button("Save as PNG", () => this.save(), this.stop.signal, "lab-link");
    const about = `${spec.model} · seed ${spec.seed} · ${text.about}`;
    const head = make("div", "lab-head", [make("span", "lab-about", [about]), save]);
    const asked = [spec.question, ...(text.tail ?? [])];
    const question = make("div", "lab-question", asked, { role: "heading", "aria-level": "2" });
    return carded(`lab-widget ${text.class}`, text.label, [head, question, ...told(spec), ...parts, this.live]);
  }

  /** "12 × 12 patches" */
  get patchesText() {
    return `${this.spec.map.rows} × ${this.spec.map.cols} patches`;
  }

  /** Change what is kept; a screen reader hears what came of it. @param {string} name @param {any} value */
  choose(name, value) {
    this.keep(name, value);
    this.say(summary(this.view()));
  }

  /** A patch in words, for a screen reader. @param {number} patch */
  spoken(patch) {
    return patchSummary(this.view(), patch);
  }

  /** What was painted. @returns {any} */
  paint() {
    const view = this.view();
    this.surface.paint(view, this.pointing);
    for (const part of this.parts) part.update(view);
    return view;
  }

  save() {
    const view = this.paint();
    saveCanvas(this.surface.figure(this.spec, view), view.title);
  }
}
