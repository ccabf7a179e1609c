// @ts-check
/**
 * The states as a curve over a slider: how high the coloured quantity rises at each state, with the patch in question
 * beside it. A press on the curve, or the slider from the keyboard, goes to a state.
 */

import { contextOf } from "./canvas.js";
import { make, setText } from "./dom.js";
import { stateName } from "./lens_view.js";

/**
 * @typedef {{key: string, curve: Float32Array, line: Float32Array | null, hi: number, state: number, kept: number, said: string,
 *   lineSaid: string}} CurveView
 */

const HIGH = 84; // CSS pixels
const EDGE = 8; // of the slider's thumb; the curve's ends lie over the slider's ends

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
    this.resized = new ResizeObserver(() => this.resize());
    this.resized.observe(this.canvas);
  }

  close() {
    this.resized.disconnect();
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
    curve.forEach((value, i) => disc(ctx, x(i), y(value), i === kept ? 4.5 : 2.5));
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

/** @param {CanvasRenderingContext2D} ctx @param {number} x @param {number} y @param {number} radius */
function disc(ctx, x, y, radius) {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.fill();
}
