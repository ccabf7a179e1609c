// @ts-check
/**
 * The picture of the lens: each patch's likeliest word written on it where there is room, and the line that says what
 * is known of the patch pointed at.
 */

import { blankCanvas, contextOf } from "./canvas.js";
import { make, setText } from "./dom.js";
import { onPicture, patchBox, patchName } from "./grid.js";
import { rootProbability } from "./lens_data.js";
import { valueText } from "./lens_view.js";

/**
 * @typedef {import("./lens_data.js").Lens} Lens
 */

const ROOM = 26; // CSS pixels a patch must be wide for a word to be read on it
const FAINT = 0.6; // of a word that the model is not sure of at all

/** The likeliest words of one state over the picture, painted again only when they change. */
export class PatchWords {
  /** @param {Lens} lens */
  constructor(lens) {
    this.lens = lens;
    this.layer = blankCanvas(1, 1);
    this.key = "";
  }

  /** CSS pixels a patch is wide. @param {HTMLCanvasElement} canvas @param {number} dot */
  cell(canvas, dot) {
    const [left, , right] = patchBox(this.lens.spec.map, 0);
    return ((right - left) * canvas.width) / this.lens.spec.map.width / dot;
  }

  /** @param {HTMLCanvasElement} canvas @param {number} dot */
  fits(canvas, dot) {
    return this.cell(canvas, dot) >= ROOM;
  }

  /** @param {HTMLCanvasElement} canvas @param {number} dot @param {number} state index */
  paint(canvas, dot, state) {
    if (!this.fits(canvas, dot)) return;
    const key = [canvas.width, canvas.height, dot, state].join();
    if (key !== this.key) this.draw(canvas, dot, state);
    this.key = key;
    contextOf(canvas).drawImage(this.layer, 0, 0);
  }

  /** @param {HTMLCanvasElement} canvas @param {number} dot @param {number} state index */
  draw(canvas, dot, state) {
    const { lens, layer } = this;
    const { map } = lens.spec;
    [layer.width, layer.height] = [canvas.width, canvas.height];
    const ctx = contextOf(layer);
    const k = canvas.width / map.width;
    const room = this.cell(canvas, dot) * dot;
    const size = Math.min(13 * dot, Math.max(8.5 * dot, 0.27 * room));
    ctx.font = `600 ${size}px system-ui, -apple-system, "DejaVu Sans", sans-serif`;
    [ctx.textAlign, ctx.textBaseline, ctx.lineJoin] = ["center", "middle", "round"];
    for (let patch = 0; patch < lens.cells; patch++) {
      if (!onPicture(map, patch)) continue;
      const first = (state * lens.cells + patch) * lens.top;
      const [left, top, right, bottom] = patchBox(map, patch);
      ctx.globalAlpha = FAINT + (1 - FAINT) * rootProbability(lens.probs[first]);
      cased(ctx, lens.texts[lens.ids[first]], (k * (left + right)) / 2, (k * (top + bottom)) / 2, room - 2 * dot, dot);
    }
  }
}

/** White with a dark casing, squeezed a little where it would not fit.
 * @param {CanvasRenderingContext2D} ctx @param {string} text @param {number} x @param {number} y @param {number} room
 * @param {number} dot */
function cased(ctx, text, x, y, room, dot) {
  let shown = text;
  while (shown.length > 2 && ctx.measureText(shown).width > 1.3 * room) shown = `${shown.slice(0, -2)}…`;
  ctx.lineWidth = 2.5 * dot;
  ctx.strokeStyle = "rgba(8, 12, 24, 0.8)";
  ctx.strokeText(shown, x, y, room);
  ctx.fillStyle = "#ffffff";
  ctx.fillText(shown, x, y, room);
}

/** Place and value of the patch pointed at, else of the locked one.
 * @param {Lens} lens */
export function lensReadout(lens) {
  const [place, value] = [make("span", "lab-place"), make("strong", "lab-value lab-lens-value")];
  return {
    root: make("div", "lab-readout", [place, value]),
    /** @param {{focus: number, locked: number, quantity: import("./lens_data.js").Quantity, state: number}} view */
    update({ focus, locked, quantity, state }) {
      const patch = focus >= 0 ? focus : locked;
      const name = patch < 0 ? "Point at a patch to read it; click to lock it." : patchName(lens.spec.map, patch);
      setText(place, patch >= 0 && patch === locked ? `${name} · locked` : name);
      setText(value, patch < 0 ? "" : valueText(lens, quantity, state, patch));
    },
  };
}
