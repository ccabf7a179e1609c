// @ts-check
/**
 * The paper: things to drag about, add, recolour and take away, by pointer or key, under the rules of the drawn world; or a picture
 * of the reader's own in its place.
 */

import { button, choices, make, segmented, setText } from "../../../widgets/js/shared/dom.js";
import { ARROWS } from "../../../widgets/js/shared/gestures.js";
import { opaque } from "./pixels.js";
import { corner, fits, randomThings, settled } from "./scene.js";

/**
 * @typedef {import("./scene.js").Thing} Thing
 * @typedef {import("./scene.js").Drawing} Drawing
 * @typedef {import("./pixels.js").Rgb} Rgb
 */

const NEAR = 6; // CSS pixels that a press may move before it is a drag
const STEP = 3; // pixels of the paper with an arrow key; with shift, five times as many
const MOST_PIXELS = 16_000_000; // that a phone's canvas holds
const THIRDS = [["top left", "top", "top right"], ["left", "middle", "right"], ["bottom left", "bottom", "bottom right"]];

export class Paper {
  /** @param {Drawing} drawing @param {() => void} changed @param {(text: string) => void} say @param {AbortSignal} signal */
  constructor(drawing, changed, say, signal) {
    this.drawing = drawing;
    this.world = drawing.world;
    this.changed = changed;
    this.say = say;
    this.signal = signal;
    this.things = /** @type {Thing[]} */ ([]);
    for (const thing of this.world.first.things) this.things.push(settled(this.world, this.things, thing) ?? thing);
    this.paper = this.world.first.paper;
    this.own = /** @type {Rgb | null} */ (null);
    this.chosen = -1;
    this.next = { color: "red", size: "large" };
    this.sheet = make("div", "lab-sheet", [], { role: "group" });
    this.photo = /** @type {HTMLCanvasElement} */ (make("canvas", "lab-photo", [], { role: "img", "aria-label": "Your own picture" }));
    this.root = make("div", "lab-stage", [this.sheet, this.photo, this.build()]);
    this.sheet.addEventListener("pointerdown", (event) => event.target === this.sheet && this.choose(-1), { signal });
    this.draw();
  }

  build() {
    const { signal, world } = this;
    const tray = make("div", "lab-tray", [], { role: "group", "aria-label": "Add a thing" });
    tray.append(...world.kinds.map((kind) => this.trayItem(kind)));
    this.tray = tray;
    const colors = Object.keys(world.colors);
    const swatch = (/** @type {string} */ name) => {
      const dot = make("span", "lab-dot", [], { "aria-hidden": "true" });
      dot.style.background = `rgb(${world.colors[name].join(", ")})`;
      return dot;
    };
    const items = colors.map((name) => ({ name, content: [swatch(name)] }));
    const pickColor = (/** @type {number} */ i) => this.change({ color: colors[i] });
    this.colors = choices({ label: "Colour", className: "lab-swatches", items, pick: pickColor, signal });
    const sizes = Object.keys(world.sizes);
    this.sizes = segmented("Size", sizes.map((size) => size[0].toUpperCase() + size.slice(1)), (i) => this.change({ size: sizes[i] }), signal);
    this.flip = button("Flip", () => this.change({ mirrored: !this.things[this.chosen].mirrored }), signal);
    this.take = button("Remove", () => this.remove(this.chosen), signal);
    this.hint = make("p", "lab-caption");
    const file = /** @type {HTMLInputElement} */ (make("input", "lab-file", [], { type: "file", accept: "image/*", "aria-label": "Open your own picture" }));
    file.addEventListener("change", () => file.files?.[0] && this.open(file.files[0]).finally(() => (file.value = "")), { signal });
    const open = make("label", "lab-button lab-open", ["Open a picture…", file]);
    this.back = button("Back to the drawing", () => this.close(), signal);
    this.fresh = button("Another scene", () => this.set(randomThings(world, Math.random), Math.floor(Math.random() * world.papers.length)), signal);
    this.clear = button("Clear", () => this.set([], this.paper), signal);
    this.tools = make("div", "lab-kit", [
      tray,
      make("div", "lab-kit-row", [this.colors.root]),
      make("div", "lab-kit-row", [this.sizes.root, make("span", "lab-kit-pair", [this.flip, this.take])]),
    ]);
    return make("div", "lab-kit", [this.tools, this.hint, make("div", "lab-kit-row", [this.fresh, this.clear, this.back, open])]);
  }

  /** @param {string} kind */
  trayItem(kind) {
    const node = make("button", "lab-tray-item", [], { type: "button", "aria-label": `Add a ${kind}`, title: kind });
    node.dataset.kind = kind;
    const { signal } = this;
    const spot = () => ({ kind, ...this.next, x: this.world.side / 2, y: this.world.side / 2, mirrored: false });
    node.addEventListener("click", (event) => event.detail === 0 && this.add(spot()), { signal }); // from the keyboard
    node.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.things.length >= this.world.most) return;
      this.follow(event, {
        start: (at) => {
          this.things.push({ ...spot(), ...at });
          this.chosen = this.things.length - 1;
          this.draw();
          return this.chosen;
        },
        press: () => this.add(spot()),
      });
    }, { signal });
    return node;
  }

  // -- what is there -------------------------------------------------------------------------

  /** The picture the model is shown. @returns {Rgb} */
  picture() {
    return this.own ?? this.drawing.picture(this.things, this.paper);
  }

  /** @param {Thing} thing */
  add(thing) {
    if (this.things.length >= this.world.most) return this.say(`No more than ${this.world.most} things: the model never saw more.`);
    const placed = settled(this.world, this.things, thing);
    if (!placed) return this.say("There is no room for it; move something first.");
    this.things.push(placed);
    this.choose(this.things.length - 1);
    this.say(`Added ${this.nameOf(placed)}.`);
    this.changed();
  }

  /** @param {number} index */
  remove(index) {
    if (index < 0) return;
    const [gone] = this.things.splice(index, 1);
    this.chosen = -1;
    this.draw();
    /** @type {HTMLElement | undefined} */ (this.sheet.children[Math.min(index, this.things.length - 1)])?.focus();
    this.say(`Removed ${this.nameOf(gone)}.`);
    this.changed();
  }

  /** @param {number} index */
  choose(index) {
    this.chosen = index;
    if (index >= 0) this.next = { color: this.things[index].color, size: this.things[index].size };
    this.draw();
  }

  /** Change the chosen thing, or what is added next. @param {Partial<Thing>} change */
  change(change) {
    const { color = this.next.color, size = this.next.size } = change;
    if (this.chosen >= 0) {
      const others = this.things.filter((_, i) => i !== this.chosen);
      const placed = settled(this.world, others, { ...this.things[this.chosen], ...change });
      if (!placed) return this.say("There is no room for it at that size.");
      this.things[this.chosen] = placed;
      this.say(`${this.nameOf(placed)}.`);
      this.changed();
    }
    this.next = { color, size };
    this.draw();
  }

  /** @param {Thing[]} things @param {number} paper */
  set(things, paper) {
    this.things = things;
    this.paper = paper;
    this.chosen = -1;
    this.draw();
    this.say(things.length ? `A scene of ${things.map((thing) => this.nameOf(thing)).join(", ")}.` : "Empty paper.");
    this.changed();
  }

  /** @param {Blob} file */
  async open(file) {
    try {
      const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });
      const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
      const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
      this.photo.width = width;
      this.photo.height = height;
      const ctx = /** @type {CanvasRenderingContext2D} */ (this.photo.getContext("2d", { willReadFrequently: true }));
      ctx.drawImage(bitmap, 0, 0, width, height);
      bitmap.close();
      this.own = opaque(ctx.getImageData(0, 0, width, height));
      this.say("Your picture is open. It stays in this page.");
    } catch {
      this.say("That file is no picture this browser can read; try a PNG or JPEG.");
    }
    this.draw();
    this.changed();
  }

  close() {
    this.own = null;
    this.draw();
    this.changed();
  }

  /** @param {Thing} thing */
  nameOf({ size, color, kind, x, y }) {
    const third = (/** @type {number} */ v) => Math.min(2, Math.max(0, Math.floor((3 * v) / this.world.side)));
    return `${size} ${color} ${kind}, ${THIRDS[third(y)][third(x)]}`;
  }

  // -- in the page ---------------------------------------------------------------------------

  draw() {
    const { world, things, own } = this;
    this.sheet.style.background = `rgb(${world.papers[this.paper].join(", ")})`;
    this.sheet.setAttribute("aria-label", `The paper with ${things.length === 1 ? "one thing" : `${things.length} things`}`);
    while (this.sheet.children.length > things.length) this.sheet.lastElementChild?.remove();
    while (this.sheet.children.length < things.length) this.sheet.append(this.slot(this.sheet.children.length));
    things.forEach((thing, i) => this.fill(/** @type {HTMLElement} */ (this.sheet.children[i]), thing, i));
    for (const node of [this.sheet, this.tools, this.fresh, this.clear]) if (node) node.hidden = own !== null;
    this.photo.hidden = own === null;
    if (this.back) this.back.hidden = own === null;
    const full = things.length >= world.most;
    for (const node of /** @type {Iterable<HTMLButtonElement>} */ (this.tray?.children ?? [])) {
      node.disabled = full;
      if (node.dataset.look !== this.next.color) node.replaceChildren(this.canvasOf({ kind: node.dataset.kind ?? "", ...this.next, x: 0, y: 0, mirrored: false }));
      node.dataset.look = this.next.color;
    }
    this.colors?.show(Object.keys(world.colors).indexOf(this.next.color), -1);
    this.sizes?.show(Object.keys(world.sizes).indexOf(this.next.size), -1);
    for (const node of [this.flip, this.take]) if (node) node.disabled = this.chosen < 0;
    if (this.hint) setText(this.hint, own ? "The model sees it as 96 × 96 pixels." : full ? "Four things: as many as the model ever saw." : "Press or drag a thing onto the paper; press one there to change it.");
  }

  /** A place for a thing; its listeners stay while things come and go. @param {number} index */
  slot(index) {
    const { signal } = this;
    const node = make("button", "lab-thing", [], { type: "button" });
    const press = (/** @type {PointerEvent} */ event) => {
      if (event.button !== 0) return;
      this.choose(index);
      node.focus();
      event.preventDefault();
      this.follow(event, { start: () => index, press: () => {} });
    };
    node.addEventListener("pointerdown", press, { signal });
    node.addEventListener("click", (event) => event.detail === 0 && this.choose(index), { signal });
    node.addEventListener("keydown", (event) => this.key(event, index), { signal });
    return node;
  }

  /** Show a thing in its slot; what has not changed is left as it is. @param {HTMLElement} node @param {Thing} thing @param {number} index */
  fill(node, thing, index) {
    const { world } = this;
    const [left, top] = corner(world, thing);
    const percent = (/** @type {number} */ pixels) => `${(100 * pixels) / world.side}%`;
    Object.assign(node.style, { left: percent(left), top: percent(top), width: percent(world.sizes[thing.size]) });
    node.setAttribute("aria-label", `${this.nameOf(thing)}. Arrow keys move it, Delete removes it.`);
    node.setAttribute("aria-pressed", String(index === this.chosen));
    node.classList.toggle("lab-nowhere", !fits(world, this.things.filter((_, i) => i !== index), thing));
    const look = `${thing.kind} ${thing.color} ${thing.mirrored}`;
    if (node.dataset.look !== look) node.replaceChildren(this.canvasOf(thing));
    node.dataset.look = look;
  }

  /** @param {KeyboardEvent} event @param {number} index */
  key(event, index) {
    if (event.key === "Delete" || event.key === "Backspace") this.remove(index);
    else if (event.key in ARROWS) {
      const [down, right] = ARROWS[event.key].map((way) => way * STEP * (event.shiftKey ? 5 : 1));
      const moved = { ...this.things[index], x: this.things[index].x + right, y: this.things[index].y + down };
      this.chosen = index;
      if (fits(this.world, this.things.filter((_, i) => i !== index), moved)) {
        this.things[index] = moved;
        this.changed();
      }
      this.draw();
      this.say(this.nameOf(this.things[index]));
    } else return;
    event.preventDefault();
  }

  /** Follow a press: as a drag once it moves, else as a press. A dragged thing settles at the nearest free spot, or goes back.
   * @param {PointerEvent} down @param {{start: (at: {x: number, y: number}) => number, press: () => void}} host */
  follow(down, host) {
    const stop = new AbortController();
    const options = { signal: AbortSignal.any([stop.signal, this.signal]) };
    const at = (/** @type {PointerEvent} */ event) => {
      const box = this.sheet.getBoundingClientRect();
      const k = this.world.side / box.width;
      return { x: (event.clientX - box.left) * k, y: (event.clientY - box.top) * k };
    };
    let index = -1;
    let before = /** @type {Thing | null} */ (null);
    let [dx, dy] = [0, 0];
    const count = this.things.length;
    const move = (/** @type {PointerEvent} */ event) => {
      if (event.pointerId !== down.pointerId) return;
      if (index < 0) {
        if (Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < NEAR) return;
        index = host.start(at(event));
        if (this.things.length === count) {
          before = { ...this.things[index] };
          const grip = at(down);
          [dx, dy] = [before.x - grip.x, before.y - grip.y];
        }
      }
      const spot = at(event);
      this.things[index] = { ...this.things[index], x: spot.x + dx, y: spot.y + dy };
      this.draw();
      event.preventDefault();
    };
    const up = (/** @type {PointerEvent} */ event) => {
      if (event.pointerId !== down.pointerId) return;
      stop.abort();
      if (index < 0) return event.type === "pointerup" ? host.press() : undefined;
      const spot = at(event);
      const off = spot.x < -30 || spot.y < -30 || spot.x > this.world.side + 30 || spot.y > this.world.side + 30;
      const others = this.things.filter((_, i) => i !== index);
      const placed = off && !before ? null : settled(this.world, others, this.things[index]);
      if (placed) this.things[index] = placed;
      else if (before) this.things[index] = before;
      else {
        this.things.splice(index, 1);
        this.chosen = -1;
      }
      this.draw();
      this.say(placed ? this.nameOf(placed) : "There is no room for it.");
      this.changed();
    };
    window.addEventListener("pointermove", move, { ...options, passive: false });
    window.addEventListener("pointerup", up, options);
    window.addEventListener("pointercancel", up, options);
  }

  /** @param {Thing} thing */
  canvasOf(thing) {
    const drawn = this.drawing.sprite(thing.kind, thing.color, "fine", thing.mirrored);
    const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", "", [], { "aria-hidden": "true" }));
    canvas.width = canvas.height = drawn.side;
    canvas.getContext("2d")?.putImageData(new ImageData(drawn.data, drawn.side, drawn.side), 0, 0);
    return canvas;
  }
}
