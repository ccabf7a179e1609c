// @ts-check
/**
 * What stands beside the lens's picture: the states as a curve over a slider; the table of top words, a row per state; the
 * projected token itself, before any layer, with its nearest words and its norm; and the field for a word to look for.
 * Each part builds its elements once; `update` writes what changed.
 */

import { contextOf } from "./shared/canvas.js";
import { button, make, setText, whenResized } from "./shared/dom.js";
import { shareText } from "./shared/maps.js";
import { commonestNear, knownTexts, nearPieces, stateName } from "./lens_data.js";

/**
 * @typedef {{key: string, curve: Float32Array, line: Float32Array | null, hi: number, state: number, kept: number, said: string,
 *   lineSaid: string}} CurveView
 * @typedef {{piece: number, value: number}} Said
 * @typedef {{key: string, tableTitle: string, tableCaption: string, rows: () => Said[][],
 *   entropy: (state: number) => string, state: number, kept: number, hits: Set<number>}} TableView
 * @typedef {{root: HTMLElement, text: HTMLElement, share: HTMLElement, fill: HTMLElement, hit: boolean}} Cell
 * @typedef {import("./lens_data.js").Lens} Lens
 * @typedef {{word: string, status: import("./lens_data.js").WordStatus, partly: boolean}} WordView
 */

const HIGH = 60; // CSS pixels
const EDGE = 8; // of the slider's thumb; the curve's ends lie over the slider's ends
const MOST_COLUMNS = 6;
let fields = 0; // ids of the lists of suggestions must differ within a page

export class LensCurve {
  /** @param {number[]} states @param {(index: number) => void} pick @param {(index: number) => void} peek -1: no longer
   * @param {() => void} changed @param {AbortSignal} signal */
  constructor(states, pick, peek, changed, signal) {
    this.states = states;
    this.changed = changed;
    this.canvas = /** @type {HTMLCanvasElement} */ (make("canvas", "lab-lens-curve", [], { "aria-hidden": "true" }));
    const last = `${states.length - 1}`;
    const attributes = { type: "range", min: "0", max: last, step: "1", "aria-label": "State" };
    this.range = /** @type {HTMLInputElement} */ (make("input", "lab-range", [], attributes));
    this.title = make("strong", "");
    this.said = make("span", "lab-lens-soft");
    this.line = make("span", "lab-lens-soft lab-lens-dashed");
    const head = make("div", "lab-lens-curve-head", [this.title, this.said, this.line]);
    this.root = make("div", "lab-lens-states", [head, this.canvas, this.range]);
    this.range.hidden = states.length < 2;
    this.canvas.hidden = states.length < 2;
    this.range.addEventListener("input", () => pick(Number(this.range.value)), { signal });
    const at = (/** @type {PointerEvent | MouseEvent} */ event) => {
      const box = this.canvas.getBoundingClientRect();
      return curveIndex(event.clientX - box.left, box.width, states.length);
    };
    this.canvas.addEventListener("click", (event) => pick(at(event)), { signal });
    this.canvas.addEventListener("pointermove", (event) => peek(at(event)), { signal });
    this.canvas.addEventListener("pointerleave", () => peek(-1), { signal });
    this.key = "";
    this.dot = 1;
    whenResized(this.canvas, () => this.resize(), signal);
  }

  resize() {
    this.dot = Math.min(2, window.devicePixelRatio || 1);
    this.canvas.width = Math.max(1, Math.round(this.canvas.clientWidth * this.dot));
    this.canvas.height = Math.round(HIGH * this.dot);
    this.key = "";
    this.changed();
  }

  /** @param {CurveView} view */
  update(view) {
    const number = this.states[view.state];
    setText(this.title, `State ${number}`);
    setText(this.said, `${stateName(number)} · ${view.said}`);
    setText(this.line, view.lineSaid);
    if (this.range.value !== `${view.kept}`) this.range.value = `${view.kept}`;
    this.range.setAttribute("aria-valuetext", `state ${this.states[view.kept]}, ${stateName(this.states[view.kept])}`);
    const style = getComputedStyle(this.canvas);
    const key = [view.key, view.state, view.kept, style.color].join();
    if (key === this.key) return;
    this.key = key;
    this.paint(view, style);
  }

  /** @param {CurveView} view @param {CSSStyleDeclaration} style */
  paint({ curve, line, hi, state, kept }, style) {
    const ctx = contextOf(this.canvas);
    const { width, height } = this.canvas;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.scale(this.dot, this.dot);
    const [wide, high] = [width / this.dot, height / this.dot];
    const x = (/** @type {number} */ i) => curveX(i, wide, curve.length);
    const y = (/** @type {number} */ value) => high - 4 - (hi > 0 ? value / hi : 0) * (high - 14);
    const accent = style.getPropertyValue("--lab-accent");
    ctx.globalAlpha = 0.16;
    ctx.fillStyle = accent;
    ctx.beginPath();
    ctx.moveTo(x(0), y(0));
    curve.forEach((value, i) => ctx.lineTo(x(i), y(value)));
    ctx.lineTo(x(curve.length - 1), y(0));
    ctx.fill();
    ctx.globalAlpha = 1;
    this.trace(ctx, curve, x, y, accent, []);
    ctx.fillStyle = accent;
    curve.forEach((value, i) => {
      ctx.beginPath();
      ctx.arc(x(i), y(value), i === kept ? 4.5 : 2.5, 0, 2 * Math.PI);
      ctx.fill();
    });
    if (line) this.trace(ctx, line, x, y, style.color, [4, 3]);
    ctx.strokeStyle = style.color;
    ctx.globalAlpha = 0.55;
    ctx.setLineDash([]);
    ctx.lineWidth = 1;
    ctx.beginPath();
    ctx.moveTo(Math.round(x(state)) + 0.5, 2);
    ctx.lineTo(Math.round(x(state)) + 0.5, high - 2);
    ctx.stroke();
    ctx.globalAlpha = 1;
  }

  /** @param {CanvasRenderingContext2D} ctx @param {Float32Array} values @param {(i: number) => number} x
   * @param {(value: number) => number} y @param {string} color @param {number[]} dash */
  trace(ctx, values, x, y, color, dash) {
    ctx.strokeStyle = color;
    ctx.lineWidth = 1.75;
    ctx.lineJoin = "round";
    ctx.setLineDash(dash);
    ctx.beginPath();
    values.forEach((value, i) => ctx.lineTo(x(i), y(value)));
    ctx.stroke();
  }
}

/** Where a state lies across the curve, CSS pixels. @param {number} index @param {number} width @param {number} count */
export function curveX(index, width, count) {
  return EDGE + (count > 1 ? index / (count - 1) : 0.5) * (width - 2 * EDGE);
}

/** The state nearest to a place across the curve. @param {number} x @param {number} width @param {number} count */
export function curveIndex(x, width, count) {
  const along = (x - EDGE) / Math.max(1, width - 2 * EDGE);
  return Math.min(count - 1, Math.max(0, Math.round(along * (count - 1))));
}

/** @param {import("./lens_data.js").Lens} lens @param {(index: number) => void} pick @param {(index: number) => void} peek
 * @param {AbortSignal} signal */
export function lensTable(lens, pick, peek, signal) {
  const columns = Math.min(lens.top, MOST_COLUMNS);
  const rows = lens.spec.states.map((state, index) => tableRow(state, columns, () => pick(index), signal));
  const names = ["state", ...Array.from({ length: columns }, (_, i) => (i ? `${i + 1}` : "likeliest")), "entropy"];
  const heads = names.map((name) => make("span", "", [name], { role: "columnheader" }));
  const header = make("div", "lab-lens-row lab-lens-header", heads, { role: "row" });
  const table = make("div", "lab-lens-table", [header, ...rows.map(({ root }) => root)], { role: "table" });
  table.style.setProperty("--lab-columns", `${columns}`);
  table.classList.toggle("lab-lens-dense", rows.length > 14);
  const indexOf = (/** @type {Event} */ event) => rows.findIndex(({ root }) => root.contains(/** @type {Node} */ (event.target)));
  table.addEventListener("click", (event) => indexOf(event) >= 0 && pick(indexOf(event)), { signal });
  table.addEventListener("pointerover", (event) => peek(indexOf(event)), { signal });
  table.addEventListener("pointerleave", () => peek(-1), { signal });
  const [title, caption] = [make("h3", "lab-lens-title"), make("p", "lab-caption")];
  let last = "";
  let marked = [-1, -1];
  return {
    root: make("section", "lab-section", [title, table, caption]),
    /** @param {TableView} view */
    update(view) {
      setText(title, view.tableTitle);
      setText(caption, view.tableCaption);
      table.setAttribute("aria-label", view.tableTitle);
      for (const index of new Set([...marked, view.state, view.kept])) {
        if (rows[index]) markRow(rows[index], index === view.state, index === view.kept);
      }
      marked = [view.state, view.kept];
      if (view.key === last) return;
      last = view.key;
      view.rows().forEach((said, index) => fillRow(lens, rows[index], said, view, index));
    },
  };
}

/** @param {number} state @param {number} columns @param {() => void} press @param {AbortSignal} signal */
function tableRow(state, columns, press, signal) {
  const attributes = { type: "button", "aria-label": `state ${state}, ${stateName(state)}` };
  const name = make("button", "lab-lens-state", [`${state}`], attributes);
  name.addEventListener("click", (event) => (event.stopPropagation(), press()), { signal });
  const cells = Array.from({ length: columns }, tableCell);
  const entropy = make("span", "lab-lens-entropy", [], { role: "cell" });
  const all = [make("span", "", [name], { role: "rowheader" }), ...cells.map(({ root }) => root), entropy];
  return { root: make("div", "lab-lens-row", all, { role: "row" }), name, cells, entropy };
}

/** @returns {Cell} */
function tableCell() {
  const [fill, text, share] = ["lab-lens-fill", "lab-lens-text", "lab-lens-share"].map((kind) => make("span", kind));
  fill.setAttribute("aria-hidden", "true");
  return { root: make("span", "lab-lens-cell", [fill, text, share], { role: "cell" }), text, share, fill, hit: false };
}

/** @param {ReturnType<typeof tableRow>} row @param {boolean} shown @param {boolean} kept */
function markRow({ root, name }, shown, kept) {
  root.classList.toggle("lab-shown", shown);
  root.classList.toggle("lab-lens-kept", kept);
  name.setAttribute("aria-pressed", String(kept));
}

/** @param {import("./lens_data.js").Lens} lens @param {ReturnType<typeof tableRow>} row @param {Said[]} said
 * @param {TableView} view @param {number} index */
function fillRow(lens, row, said, view, index) {
  row.cells.forEach((cell, i) => {
    const one = said[i];
    setText(cell.text, one ? lens.texts[one.piece] : "");
    setText(cell.share, one ? shareText(one.value) : "");
    cell.fill.style.transform = `scaleX(${one ? one.value : 0})`; // costs no layout
    const hit = Boolean(one) && view.hits.has(one.piece);
    if (hit !== cell.hit) cell.root.classList.toggle("lab-lens-hit", hit);
    cell.hit = hit;
  });
  setText(row.entropy, view.entropy(index));
}

/** @param {Lens} lens */
export function nearList(lens) {
  const about = lens.spec.near;
  if (!about) return null;
  const space = about.space === "output" ? "output head" : "input embeddings";
  const lines = Array.from({ length: about.top }, () => {
    const [text, fill, value] = ["lab-lens-text", "lab-fill", "lab-value"].map((kind) => make("span", kind));
    const bar = make("span", "lab-bar", [fill], { "aria-hidden": "true" });
    return { root: make("li", "lab-lens-near-line", [text, bar, value]), text, value, fill };
  });
  const [title, norm, caption] = [make("h3", "lab-lens-title"), make("p", "lab-lens-norm"), make("p", "lab-caption")];
  setText(caption, `Cosines with the ${space}${about.centered ? ", each less the mean of its kind" : ", as they are"}.`);
  const sorted = lens.norms.slice().sort();
  const everywhere = commonestNear(lens);
  let last = -2;
  return {
    root: make("section", "lab-section", [title, make("ul", "lab-lens-near", lines.map(({ root }) => root)), norm, caption]),
    /** @param {{patch: number}} view */
    update({ patch }) {
      if (patch === last) return;
      last = patch;
      setText(title, patch < 0 ? "Nearest words, by share of patches" : "Nearest words of the projected token");
      const said = patch < 0 ? everywhere : nearPieces(lens, patch);
      lines.forEach(({ root, text, value, fill }, i) => {
        root.classList.toggle("lab-empty", !said[i]);
        setText(text, said[i] ? lens.texts[said[i].piece] : "–");
        setText(value, said[i] ? (patch < 0 ? shareText(said[i].value) : said[i].value.toFixed(2).replace("-", "−")) : "");
        fill.style.transform = `scaleX(${said[i] ? Math.max(0, said[i].value) : 0})`;
      });
      setText(norm, normText(lens.norms, sorted, patch));
    },
  };
}

/** How long a token is beside those of all patches.
 * @param {Float32Array} norms @param {Float32Array} sorted @param {number} patch */
export function normText(norms, sorted, patch) {
  const say = (/** @type {number} */ value) => String(Number(value.toPrecision(3)));
  const middle = say(sorted[Math.floor(sorted.length / 2)]);
  if (patch < 0) return `Norms ${say(sorted[0])} to ${say(sorted[sorted.length - 1])}, median ${middle}`;
  const longer = norms.reduce((count, one) => count + Number(one > norms[patch]), 0);
  return `Norm ${say(norms[patch])}, rank ${longer + 1} of ${norms.length}; median ${middle}`;
}

/** @param {import("./lens_data.js").Lens} lens @param {(word: string) => void} type @param {(word: string) => void} enter
 * @param {AbortSignal} signal */
export function wordField(lens, type, enter, signal) {
  const id = `lab-lens-pieces-${(fields += 1)}`;
  const list = make("datalist", "", [], { id });
  const attributes = { type: "text", list: id, placeholder: "a word", autocomplete: "off", spellcheck: "false" };
  const more = { autocapitalize: "off", maxlength: "80", "aria-label": "Word to look for" };
  const input = /** @type {HTMLInputElement} */ (make("input", "lab-lens-input", [], { ...attributes, ...more }));
  input.addEventListener("input", () => type(input.value), { signal });
  input.addEventListener("change", () => enter(input.value), { signal });
  let listed = ""; // of which lens
  const suggest = () => {
    if (listed === lens.kind) return;
    listed = lens.kind;
    list.replaceChildren(...knownTexts(lens).map((text) => make("option", "", [], { value: text })));
  };
  input.addEventListener("focus", suggest, { signal }); // thousands at 7B size: not before they are needed
  const asked = lens.spec.words.map((word) => {
    const press = () => enter(node.getAttribute("aria-pressed") === "true" ? "" : word.trim());
    const node = button(word.trim(), press, signal, "lab-pills-item");
    return node;
  });
  const pills = make("div", "lab-pills", asked, { role: "group", "aria-label": "Words known everywhere" });
  const [status, closest] = [make("span", ""), make("span", "lab-pills lab-lens-closest")];
  const bar = make("div", "lab-lens-word", [make("span", "lab-label", ["Look for"]), input, list, pills]);
  let shown = "";
  let last = /** @type {import("./lens_data.js").WordStatus | null} */ (null);
  return {
    root: make("div", "lab-lens-find", [bar, make("p", "lab-lens-status", [status, closest], { "aria-live": "polite" })]),
    /** @param {WordView} view */
    update({ word, status: said, partly }) {
      if (word !== shown && input.value.trim() !== word) input.value = word;
      shown = word;
      if (said === last) return;
      last = said;
      for (const node of asked) {
        node.setAttribute("aria-pressed", String(node.textContent === word));
        node.classList.toggle("lab-shown", node.textContent === word);
      }
      setText(status, said.text);
      status.classList.toggle("lab-lens-partly", partly);
      closest.hidden = !said.closest.length;
      const near = said.closest.map((text) => button(text, () => enter(text), signal, "lab-pills-item"));
      closest.replaceChildren(make("span", "lab-lens-soft", ["Closest known:"]), ...near);
    },
  };
}
