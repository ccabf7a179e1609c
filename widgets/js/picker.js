// @ts-check
/**
 * PicturePicker: choose a picture from a gallery, from a file, by dropping or pasting one. And CodeBox: lines to copy.
 *
 * A chosen file is read and made smaller here, so that a large photograph reaches Python at all (one message may have ten
 * megabytes, and a larger one is lost without a word). Python is sent `picture`, a PNG or JPEG, with its `name`.
 */

import { button, carded, choices, make, setText } from "./shared/dom.js";
import { Panel, shows } from "./shared/panel.js";

/**
 * @typedef {{gallery: {name: string, image: string}[], longest: number, kinds: string[]}} PickerSpec
 */

/** How large a picture is sent: as it is, or with its longer side at `longest`.
 * @param {number} width @param {number} height @param {number} longest @returns {[number, number]} */
export function sentSize(width, height, longest) {
  const scale = Math.min(1, longest / Math.max(width, height));
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** What is wrong with a file, or "". @param {{type: string, name: string}} file @param {string[]} kinds */
export function refusal(file, kinds) {
  if (kinds.includes(file.type)) return "";
  const named = kinds.map((kind) => kind.replace("image/", "").toUpperCase()).join(", ");
  return `“${file.name}” is not a picture that can be read here; expected ${named}.`;
}

class Picker extends Panel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["spec", "chosen", "problem"]);
    const spec = /** @type {PickerSpec} */ (model.get("spec"));
    this.spec = spec;
    const { signal } = this.stop;
    this.file = /** @type {HTMLInputElement} */ (
      make("input", "lab-file", [], { type: "file", accept: spec.kinds.join(","), "aria-label": "Picture file", tabindex: "-1" })
    );
    this.file.addEventListener("change", () => this.take(this.file.files?.[0]), { signal });
    const open = button("Choose a file", () => this.file.click(), signal, "lab-button lab-primary");
    this.problem = make("p", "lab-picker-problem", [], { role: "alert" });
    const zone = make("div", "lab-drop", [open, make("span", "lab-drop-hint", ["or drop or paste a picture here"]), this.file]);
    const items = spec.gallery.map(({ name, image }) => ({
      name,
      content: [make("img", "lab-thumb", [], { src: image, alt: "" }), make("span", "lab-thumb-name", [name], { title: name })],
    }));
    const pick = (/** @type {number} */ index) => this.choose(index);
    this.gallery = choices({ label: "Pictures to try", className: "lab-gallery", items, pick, signal });
    const parts = [zone, this.problem, this.gallery.root, this.live];
    const root = carded("lab-widget lab-picker", "Choose a picture", parts, "lab-card lab-picker-card");
    this.receive(root, zone);
    this.open(root, el);
  }

  /** Dropped and pasted files. @param {HTMLElement} root @param {HTMLElement} zone */
  receive(root, zone) {
    const { signal } = this.stop;
    const over = (/** @type {boolean} */ on) => zone.classList.toggle("lab-over", on);
    root.addEventListener("dragover", (event) => (event.preventDefault(), over(true)), { signal });
    root.addEventListener("dragleave", () => over(false), { signal });
    root.addEventListener(
      "drop",
      (event) => {
        event.preventDefault();
        event.stopPropagation(); // a notebook would take the file as an attachment
        over(false);
        this.take(event.dataTransfer?.files[0]);
      },
      { signal },
    );
    root.addEventListener("paste", (event) => this.take(event.clipboardData?.files[0]), { signal });
  }

  /** @param {number} index of the gallery */
  choose(index) {
    setText(this.problem, "");
    this.keep("chosen", index);
    this.say(`${this.spec.gallery[index].name} is chosen.`);
  }

  /** Read a file, make it smaller, send it. @param {File | undefined} file */
  async take(file) {
    if (!file) return;
    setText(this.problem, refusal(file, this.spec.kinds));
    if (this.problem.textContent) return;
    try {
      const image = await createImageBitmap(file);
      const [width, height] = sentSize(image.width, image.height, this.spec.longest);
      const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", ""));
      Object.assign(canvas, { width, height });
      canvas.getContext("2d")?.drawImage(image, 0, 0, width, height);
      image.close();
      const kind = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
      const blob = await new Promise((done) => canvas.toBlob(done, kind, 0.95));
      const bytes = await /** @type {Blob} */ (blob).arrayBuffer();
      this.model.set("name", file.name);
      this.model.set("chosen", -1);
      this.keep("picture", new DataView(bytes));
      this.say(`${file.name} is chosen.`);
    } catch {
      setText(this.problem, `“${file.name}” cannot be read as a picture.`);
    }
    this.file.value = ""; // the same file may be chosen again
  }

  paint() {
    const chosen = /** @type {number} */ (this.model.get("chosen"));
    this.gallery.show(chosen, chosen);
    if (this.model.get("problem")) setText(this.problem, this.model.get("problem"));
    // none chosen: the first can be reached by the keyboard
    if (chosen < 0 && this.gallery.buttons.length) this.gallery.buttons[0].tabIndex = 0;
  }
}

class CodeBox extends Panel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["code"]);
    this.code = make("code", "");
    const copy = button("Copy the code of this", () => this.copy(), this.stop.signal, "lab-button");
    this.told = make("span", "lab-copied", [], { role: "status" });
    const pre = make("pre", "lab-code", [this.code], { tabindex: "0", "aria-label": "The same in Python" });
    const parts = [make("div", "lab-head", [copy, this.told]), pre];
    this.open(carded("lab-widget", "Code", parts, "lab-card lab-code-card"), el);
  }

  async copy() {
    const text = /** @type {string} */ (this.model.get("code"));
    try {
      await navigator.clipboard.writeText(text);
      setText(this.told, "Copied.");
    } catch {
      // a page without the right to write there: the lines are marked, and Ctrl-C takes them
      getSelection()?.selectAllChildren(this.code);
      setText(this.told, "Marked; press Ctrl-C to copy.");
    }
  }

  paint() {
    const text = /** @type {string} */ (this.model.get("code"));
    setText(this.code, text);
    if (this.root) this.root.hidden = !text; // nothing was done yet
    setText(this.told, "");
  }
}

export const renderPicker = shows(Picker);
export const renderCode = shows(CodeBox);
