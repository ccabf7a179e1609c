// @ts-check
/**
 * LossPlot in the page: loss by step for each curve, the time left, one step read off, and a stop button.
 */

import { button, carded, make, setText } from "./shared/dom.js";
import { bytesOf, formatNumber } from "./shared/maps.js";
import { Panel, shows } from "./shared/panel.js";
import { Plot, plotText } from "./shared/plot.js";

/**
 * @typedef {{name: string, steps: Float32Array, losses: Float32Array, total: number | null}} LossCurve
 * @typedef {{curves: {name: string, count: number, total: number | null}[], left: number | null, log: boolean, state: string,
 *   colors: string[], heard: boolean}} LossSpec
 */

const LOSS_HEIGHT = 280;
const ROUND_STEPS = [1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10];
const LOSS_FRAME = { left: 58, right: 14, top: 12, bottom: 34 };

/** @param {LossSpec} spec @param {DataView | Uint8Array} data @returns {LossCurve[]} */
export function readLosses(spec, data) {
  const numbers = new Float32Array(bytesOf(data).slice().buffer);
  let at = 0;
  return spec.curves.map(({ name, count, total }) => {
    const rows = numbers.subarray(at, (at += 2 * count));
    return { name, total, steps: rows.filter((_, i) => i % 2 === 0), losses: rows.filter((_, i) => i % 2 === 1) };
  });
}

/** The ranges of steps and (logarithms of) losses. @param {LossCurve[]} curves @param {boolean} log */
export function lossRange(curves, log) {
  const turn = (/** @type {number} */ value) => (log ? Math.log10(value) : value);
  const every = curves.flatMap(({ losses }) => [...losses].map(turn).filter(Number.isFinite));
  const last = Math.max(1, ...curves.flatMap(({ steps, total }) => [...(total ? [total] : []), steps[steps.length - 1] ?? 1]));
  const low = every.length ? Math.min(...every) : 0;
  const high = every.length ? Math.max(...every) : 1;
  const lo = log ? low : Math.min(0, low);
  const hi = high > lo ? high : lo + 1;
  return { last, lo, hi: log || lo ? hi : roundTop(hi), turn };
}

/** The least four round steps from 0 that reach a positive value. @param {number} value */
export function roundTop(value) {
  const unit = 10 ** Math.floor(Math.log10(value / 4));
  return 4 * unit * (ROUND_STEPS.find((step) => step * unit >= (value / 4) * (1 - 1e-9)) ?? 10);
}

/** A time as a person says it. @param {number} seconds */
export function timeText(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/** What is said of a training. @param {LossSpec} spec @param {number | null} total @param {number | undefined} step
 * @param {boolean} asked whether Stop was pressed */
export function stateText(spec, total, step, asked) {
  const at = step === undefined ? "" : `step ${Math.round(step)}`;
  if (spec.state === "failed") return at ? `broke off after ${at}` : "broke off before the first step";
  if (spec.state === "stopped") return at ? `stopped at ${at}, the model is kept` : "stopped before the first step";
  if (spec.state === "finished") return at ? `finished after ${at}` : "finished";
  const where = at && !spec.heard ? " · ■ of the notebook stops it" : "";
  if (asked) return `${at || "waiting for the first step"} · stopping after this step`;
  if (!at) return "waiting for the first step";
  return `${at}${total === null ? "" : ` of ${total}`}${spec.left === null ? "" : ` · ${timeText(spec.left)} left`}${where}`;
}

class LossView extends Panel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["spec", "stopped"]);
    const { signal } = this.stop;
    this.at = -1; // the step read off
    const host = {
      find: (/** @type {number} */ x) => ({ row: 0, window: this.stepAt(x) }),
      next: (/** @type {string} */ key) => this.stepped(key),
      hover: (/** @type {any} */ spot) => this.read(spot ? spot.window : -1),
      pick: (/** @type {any} */ spot) => this.read(spot ? spot.window : -1),
      height: () => LOSS_HEIGHT,
      changed: () => this.refresh(),
    };
    this.plot = new Plot("lab-loss-plot", "Loss by step. Left and right move, Escape leaves.", /** @type {any} */ (host), signal);
    this.legend = make("div", "lab-loss-legend");
    this.status = make("span", "lab-loss-status", [], { role: "status" });
    this.press = button("Stop", () => this.keep("stopped", true), signal);
    const head = make("div", "lab-loss-head", [this.legend, this.status, this.press]);
    this.curves = /** @type {LossCurve[]} */ ([]);
    this.open(carded("lab-widget lab-loss", "Training loss", [head, this.plot.canvas, this.live]), el);
  }

  /** @param {string} key */
  stepped(key) {
    const way = key === "ArrowRight" ? 1 : key === "ArrowLeft" ? -1 : 0;
    const steps = [...(this.curves[this.curves.length - 1]?.steps ?? [])];
    if (!way || !steps.length) return null;
    const here = this.at < 0 ? -1 : nearestStep(steps, this.at);
    return { row: 0, window: steps[Math.max(0, Math.min(steps.length - 1, here < 0 ? steps.length - 1 : here + way))] };
  }

  /** @param {number} step */
  read(step) {
    this.at = step;
    if (step >= 0) setText(this.live, this.curves.map((curve) => lossSaid(curve, step)).join("; "));
    this.refresh();
  }

  /** @param {number} x */
  stepAt(x) {
    const inside = this.plot.width - LOSS_FRAME.left - LOSS_FRAME.right;
    return Math.max(0, ((x - LOSS_FRAME.left) / inside) * lossRange(this.curves, false).last);
  }

  paint() {
    const spec = /** @type {LossSpec} */ (this.model.get("spec"));
    this.curves = readLosses(spec, this.model.get("data"));
    const current = this.curves[this.curves.length - 1];
    const step = current.steps[current.steps.length - 1];
    const over = ["finished", "stopped", "failed"].includes(spec.state);
    setText(this.status, stateText(spec, current.total, step, this.model.get("stopped")));
    /** @type {HTMLButtonElement} */ (this.press).disabled = over || this.model.get("stopped");
    this.press.hidden = over || !spec.heard;
    this.legend.replaceChildren(
      ...this.curves.map((curve, i) => {
        const swatch = make("span", "lab-loss-swatch");
        swatch.style.background = spec.colors[i % spec.colors.length];
        return make("span", "lab-loss-name", [swatch, lossSaid(curve, this.at)]);
      }),
    );
    this.draw(spec);
  }

  /** @param {LossSpec} spec */
  draw({ log, colors }) {
    const sheet = this.plot.sheet();
    const { ctx, width, height, ink } = sheet;
    const { last, lo, hi, turn } = lossRange(this.curves, log);
    const { left, top } = LOSS_FRAME;
    const [right, bottom] = [width - LOSS_FRAME.right, height - LOSS_FRAME.bottom];
    const x = (/** @type {number} */ step) => left + (step / last) * (right - left);
    const y = (/** @type {number} */ loss) => bottom - ((turn(loss) - lo) / (hi - lo)) * (bottom - top);
    for (let part = 0; part <= 4; part++) {
      const value = lo + (part / 4) * (hi - lo);
      const line = bottom - (part / 4) * (bottom - top);
      ctx.globalAlpha = 0.14;
      ctx.fillStyle = ink;
      ctx.fillRect(left, line, right - left, 1);
      ctx.globalAlpha = 1;
      plotText(sheet, formatNumber(log ? 10 ** value : value), left - 8, line, { align: "right" });
      const align = part === 4 ? "right" : "center";
      plotText(sheet, `${Math.round((part / 4) * last)}`, left + (part / 4) * (right - left), bottom + 14, { align });
    }
    plotText(sheet, "step", (left + right) / 2 + 40, bottom + 27, { align: "left" });
    if (this.at >= 0) {
      ctx.fillStyle = ink;
      ctx.globalAlpha = 0.4;
      ctx.fillRect(x(this.at), top, 1, bottom - top);
      ctx.globalAlpha = 1;
    }
    ctx.lineWidth = 1.8;
    this.curves.forEach(({ steps, losses }, i) => {
      ctx.strokeStyle = ctx.fillStyle = colors[i % colors.length];
      ctx.beginPath();
      let open = false;
      losses.forEach((loss, place) => {
        if (!Number.isFinite(turn(loss))) return (open = false);
        if (open) ctx.lineTo(x(steps[place]), y(loss));
        else ctx.moveTo(x(steps[place]), y(loss));
        return (open = true);
      });
      ctx.stroke();
      const end = losses.length - 1;
      if (end >= 0 && Number.isFinite(turn(losses[end]))) ctx.fillRect(x(steps[end]) - 2, y(losses[end]) - 2, 4, 4);
    });
  }
}

/** @param {ArrayLike<number>} steps @param {number} step */
function nearestStep(steps, step) {
  let best = 0;
  for (let i = 1; i < steps.length; i++) if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
  return best;
}

/** A curve's loss at a step, or its last one. @param {LossCurve} curve @param {number} step */
export function lossSaid({ name, steps, losses }, step) {
  if (!losses.length) return name;
  const place = step < 0 ? losses.length - 1 : nearestStep(steps, step);
  const value = Number.isFinite(losses[place]) ? losses[place].toFixed(3) : "not a number";
  return step < 0 ? `${name} ${value}` : `${name} ${value} at ${Math.round(steps[place])}`;
}

export const renderLoss = shows(LossView);
