// @ts-check
/**
 * What every widget of the lab does the same way: it follows Python's model, repaints once a frame, lets no key
 * out to the notebook, shares which patch is pointed at, and leaves nothing behind. Knows no maps.
 */

import { make, setText } from "./dom.js";
import { sorted } from "./grid.js";

/**
 * @typedef {{get: (name: string) => any, set: (name: string, value: any) => void, save_changes: () => void,
 *   send: (content: any) => void, on: (name: string, call: () => void) => void,
 *   off: (name: string, call: () => void) => void}} Model
 * @typedef {import("./gestures.js").Pointing} Pointing
 */

export class Panel {
  /** @param {Model} model @param {string[]} names what of the model is shown */
  constructor(model, names) {
    this.model = model;
    this.heard = [...names, "selected", "pointed"].map((name) => `change:${name}`);
    this.stop = new AbortController();
    this.refresh = this.refresh.bind(this);
    this.pointing = /** @type {Pointing} */ ({ hover: -1, cursor: -1, dragging: [] });
    this.frame = 0;
    this.live = make("div", "lab-live", [], { "aria-live": "polite" });
    this.root = /** @type {HTMLElement | null} */ (null);
  }

  /** Put the finished root in the page and begin to listen.
   * @param {HTMLElement} root @param {HTMLElement} el */
  open(root, el) {
    this.root = root;
    const { signal } = this.stop;
    for (const kind of ["keydown", "keyup", "keypress"]) {
      // JupyterLab's command mode would take "d d" as "delete the cell"
      root.addEventListener(kind, (event) => event.stopPropagation(), { signal });
    }
    for (const name of this.heard) this.model.on(name, this.refresh);
    el.append(root);
    this.refresh();
  }

  close() {
    this.stop.abort();
    for (const name of this.heard) this.model.off(name, this.refresh);
    cancelAnimationFrame(this.frame);
    this.frame = -1; // a late event asks for no further frame
    this.root?.remove();
  }

  /** Repaint with the next frame, once however often this is called before it. */
  refresh() {
    if (this.frame !== 0) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
    });
  }

  /** What a frame shows; each widget has its own. */
  paint() {}

  /** Change state that stays in the page, and repaint.
   * @template {object} T @param {T} state @param {Partial<T>} change */
  set(state, change) {
    Object.assign(state, change);
    this.refresh();
  }

  /** Change state that Python hears of.
   * @param {string} name @param {any} value */
  keep(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
    this.refresh();
  }

  /** Follow the pointer or cursor. Linked views see the patch; Python is not told.
   * @param {Partial<Pointing>} change */
  point(change) {
    const before = this.pointing.hover;
    this.set(this.pointing, change);
    if (this.pointing.hover !== before) this.model.set("pointed", this.pointing.hover);
  }

  /** The patch under the pointer, under the cursor, or pointed at in a linked view; -1 for none. */
  get focus() {
    const { hover, cursor } = this.pointing;
    return hover >= 0 ? hover : cursor >= 0 ? cursor : (this.model.get("pointed") ?? -1);
  }

  get selected() {
    return new Set(/** @type {number[]} */ (this.model.get("selected")));
  }

  /** @param {Set<number>} patches */
  select(patches) {
    this.keep("selected", sorted(patches));
  }

  /** @param {string} text for a screen reader */
  say(text) {
    setText(this.live, text);
  }
}

/** What a host calls to show a widget; it gives back the clean-up.
 * @param {new (model: Model, el: HTMLElement) => {close: () => void}} Widget */
export function shows(Widget) {
  return (/** @type {{model: Model, el: HTMLElement}} */ { model, el }) => {
    const widget = new Widget(model, el);
    return () => widget.close();
  };
}
