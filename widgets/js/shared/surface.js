// @ts-check
/**
 * The canvas in the page: it follows its size, keeps what is costly to draw again, and paints a view.
 */

import { blankCanvas, contextOf, groundsOf, meanColor, paintBase } from "./canvas.js";
import { paintFigure, paintGround, paintHeat, paintScene } from "./canvas.js";
import { make, whenResized } from "./dom.js";

/**
 * @import { MapView as View } from "./view.js"
 * @import { Pointing } from "./gestures.js"
 */

const TALLEST = 460; // CSS pixels; a tall picture gets narrower rather than longer
const SAVED = 1200; // pixels across the picture in a saved figure
const HELP = "Arrow keys move, space selects, shift with arrows selects a block, escape clears.";

export class Surface {
  /** @param {import("./grid.js").PictureMap} map @param {Record<string, Uint8Array>} palettes
   * @param {() => void} changed called when the view must be painted again @param {AbortSignal} signal */
  constructor(map, palettes, changed, signal) {
    this.map = map;
    this.palettes = palettes;
    this.changed = changed;
    this.canvas = patchCanvas(this.map);
    this.picture = /** @type {ImageBitmap | null} */ (null);
    this.base = this.ground = this.pale = blankCanvas(1, 1);
    this.heat = blankCanvas(1, 1);
    this.heatKey = "";
    this.mean = "#ffffff";
    this.dot = 1;
    whenResized(this.canvas, () => this.resize(), signal);
    signal.addEventListener("abort", () => this.close());
  }

  /** @param {Blob} file */
  async load(file) {
    this.picture = await createImageBitmap(file);
    this.resize();
  }

  close() {
    this.picture?.close();
    this.picture = null;
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height || !this.picture) return;
    this.dot = Math.min(2, window.devicePixelRatio || 1); // the reader may have zoomed
    this.canvas.width = Math.round(width * this.dot);
    this.canvas.height = Math.round(height * this.dot);
    this.base = paintBase(this.map, this.picture, this.canvas.width, this.canvas.height);
    this.ground = paintGround(this.base);
    this.pale = paintGround(this.base, 1);
    this.mean = meanColor(this.ground);
    this.changed();
  }

  /** @param {View} view @param {Pointing} pointing */
  paint(view, pointing) {
    const { shown, palette } = view;
    const { smooth } = view.display;
    const key = shown ? [shown.key, smooth, palette].join() : "";
    if (shown && key !== this.heatKey) {
      paintHeat(this.heat, shown.levels, shown.table(this.palettes[palette]), this.map.rows, this.map.cols, smooth);
    }
    this.heatKey = key;
    paintScene(contextOf(this.canvas), this.scene(view, pointing), this.dot);
  }

  /** The figure to save. `paint` must have shown this view.
   * @param {{question: string, answer: string, model: string, seed: number}} spec @param {View} view */
  figure(spec, view) {
    const { base, ground, pale } = groundsOf(this.map, this.picture, SAVED);
    const under = view.palette.startsWith("grey") ? { base: pale, ground: pale } : { base, ground };
    const scene = { ...this.scene(view, { hover: -1, cursor: -1, dragging: [] }), ...under };
    const [low, , high] = view.shown?.ends ?? ["", "", ""];
    return paintFigure(scene, {
      question: spec.question,
      answer: spec.answer,
      title: view.title,
      caption: `${spec.model} · seed ${spec.seed} · ${view.caption}`,
      ends: [low, high],
      colors: this.palettes[view.palette],
      mean: view.mean,
    });
  }

  /** @param {View} view @param {Pointing} pointing @returns {import("./canvas.js").Scene} */
  scene(view, pointing) {
    const { display, selected, map, focus: hover } = view;
    const grey = view.palette.startsWith("grey");
    const under = { base: grey ? this.pale : this.base, ground: grey ? this.pale : this.ground };
    return { map, ...under, heat: view.shown && this.heat, ...display, selected, ...pointing, hover };
  }
}

/** How wide the picture may become, CSS pixels.
 * @param {import("./grid.js").PictureMap} map @param {number} [tallest] */
export function widest(map, tallest = TALLEST) {
  return Math.round((tallest * map.width) / map.height);
}

/** Hand a drawing to the reader as a PNG file.
 * @param {HTMLCanvasElement} canvas @param {string} title */
export function saveCanvas(canvas, title) {
  canvas.toBlob((file) => {
    if (!file) return;
    const url = URL.createObjectURL(file);
    make("a", "", [], { href: url, download: fileName(title) }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000); // the browser needs it until the download began
  });
}

/** @param {string} title */
export function fileName(title) {
  const bare = title.replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-+|-+$/g, "");
  return `patches-${bare || "map"}.png`;
}

/** @param {import("./grid.js").PictureMap} map */
function patchCanvas(map) {
  const attributes = {
    tabindex: "0",
    role: "application",
    "aria-roledescription": "patch grid",
    "aria-label": `The picture in ${map.rows} by ${map.cols} patches. ${HELP}`,
  };
  const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", "lab-canvas", [], attributes));
  canvas.style.aspectRatio = `${map.width} / ${map.height}`;
  return canvas;
}
