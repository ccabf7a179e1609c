// @ts-check
/**
 * A canvas to point at: sized with its column, sharp on fine screens, one place under the pointer, one chosen by click or
 * arrow keys. What is drawn, and what lies where, is its maker's.
 */

import { contextOf } from "./canvas.js";
import { make, whenResized } from "./dom.js";
import { spotGestures } from "./gestures.js";

/**
 * @typedef {import("../flow_data.js").Spot} Spot
 * @typedef {{find: (x: number, y: number) => Spot | null, next: (key: string) => Spot | null, hover: (spot: Spot | null) => void,
 *   pick: (spot: Spot | null) => void, height: (width: number) => number, changed: () => void}} PlotHost
 * @typedef {{ctx: CanvasRenderingContext2D, width: number, height: number, ink: string, paper: string, font: string}} Sheet
 */

export class Plot {
  /** @param {string} className @param {string} label @param {PlotHost} host @param {AbortSignal} signal */
  constructor(className, label, host, signal) {
    this.host = host;
    const attributes = { tabindex: "0", role: "application", "aria-roledescription": "plot", "aria-label": label };
    this.canvas = /** @type {HTMLCanvasElement} */ (make("canvas", `lab-canvas lab-flow-plot ${className}`, [], attributes));
    this.dot = 1;
    this.width = 1;
    spotGestures(this.canvas, host, signal);
    whenResized(this.canvas, () => this.resize(), signal);
  }

  resize() {
    const width = this.canvas.clientWidth;
    if (!width) return;
    this.dot = Math.min(2, window.devicePixelRatio || 1);
    this.width = width;
    const height = this.host.height(width);
    const [across, down] = [Math.round(width * this.dot), Math.round(height * this.dot)];
    if (this.canvas.width === across && this.canvas.height === down) return;
    this.canvas.style.height = `${height}px`;
    [this.canvas.width, this.canvas.height] = [across, down];
    this.host.changed();
  }

  /** An empty sheet in CSS pixels, with the theme's colours. @returns {Sheet} */
  sheet() {
    const ctx = contextOf(this.canvas);
    const style = getComputedStyle(this.canvas);
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.canvas.width, this.canvas.height);
    ctx.setTransform(this.dot, 0, 0, this.dot, 0, 0);
    const height = this.canvas.height / this.dot;
    return { ctx, width: this.width, height, ink: style.color, paper: style.backgroundColor, font: style.fontFamily };
  }
}

/** A line of text. @param {Sheet} sheet @param {string} text @param {number} x @param {number} y
 * @param {{align?: CanvasTextAlign, size?: number, weight?: string, alpha?: number, room?: number, color?: string}} [how] */
export function plotText({ ctx, ink, font }, text, x, y, how = {}) {
  const { align = "left", size = 11.5, weight = "400", alpha = 0.75, room = Infinity, color = ink } = how;
  ctx.save();
  ctx.globalAlpha = alpha;
  ctx.fillStyle = color;
  ctx.font = `${weight} ${size}px ${font}`;
  ctx.textAlign = align;
  ctx.textBaseline = "middle";
  ctx.translate(x, y);
  let shown = text;
  while (shown.length > 2 && ctx.measureText(shown).width > room) shown = `${shown.slice(0, -2).trimEnd()}…`;
  ctx.fillText(shown, 0, 0);
  ctx.restore();
}

/** Every how many of a row of numbers is written. @param {number} size CSS pixels of one @param {number} room that one needs */
export function every(size, room) {
  return Math.max(1, Math.ceil(room / size));
}
