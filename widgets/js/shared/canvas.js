// @ts-check
/**
 * Painting: the picture, the map over it, the grid, the selection, and a figure to save.
 * Pure drawing on a 2D context; it reads a scene and keeps no state.
 */

import { clipToPicture, modelSquare, outline, patchBox } from "./grid.js";
import { smoothLevels } from "./maps.js";

/**
 * @import { Box, PictureMap } from "./grid.js"
 * @typedef {{map: PictureMap, base: HTMLCanvasElement, ground: HTMLCanvasElement,
 *   heat: HTMLCanvasElement | null, smooth: boolean, spotlight: boolean, opacity: number,
 *   selected: Set<number>, dragging: number[], hover: number, cursor: number}} Scene
 */

const FINEST = 16; // CSS pixels between grid lines
const SMOOTH_ZOOM = 8; // samples per patch side before the browser's own smoothing
const WHITE = "rgba(255, 255, 255, 0.95)";
const CASING = "rgba(8, 12, 24, 0.85)";
const PALER = 0.6; // how much of the picture's own colour gives way to the map's

/** @param {number} width @param {number} height */
export function blankCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width));
  canvas.height = Math.max(1, Math.round(height));
  return canvas;
}

/** @param {HTMLCanvasElement} canvas */
export function contextOf(canvas) {
  const ctx = canvas.getContext("2d");
  if (!ctx) throw new Error("this browser gives no 2D canvas");
  return ctx;
}

/** One map as a small image: a pixel per patch, or several between which values are interpolated.
 * @param {HTMLCanvasElement} canvas @param {Uint8Array} levels @param {Uint32Array} table
 * @param {number} rows @param {number} cols @param {boolean} smooth */
export function paintHeat(canvas, levels, table, rows, cols, smooth) {
  const zoom = smooth ? SMOOTH_ZOOM : 1;
  const source = smooth ? smoothLevels(levels, rows, cols, zoom) : levels;
  if (canvas.width !== cols * zoom || canvas.height !== rows * zoom) {
    canvas.width = cols * zoom;
    canvas.height = rows * zoom;
  }
  const ctx = contextOf(canvas);
  const image = ctx.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = table[source[i]];
  ctx.putImageData(image, 0, 0);
}

/** What never changes at one size: the picture, and the part the model did not see.
 * @param {PictureMap} map @param {CanvasImageSource | null} picture @param {number} width @param {number} height */
export function paintBase(map, picture, width, height) {
  const canvas = blankCanvas(width, height);
  const ctx = contextOf(canvas);
  ctx.imageSmoothingQuality = "high";
  if (picture) ctx.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const k = canvas.width / map.width;
  const seen = scaled(clipToPicture(map, modelSquare(map)), k);
  /** @type {Box[]} */
  const strips = [
    [0, 0, canvas.width, seen[1]],
    [0, seen[3], canvas.width, canvas.height],
    [0, seen[1], seen[0], seen[3]],
    [seen[2], seen[1], canvas.width, seen[3]],
  ];
  for (const strip of strips) if (strip[2] - strip[0] > 0.5 && strip[3] - strip[1] > 0.5) hatch(ctx, strip);
  return canvas;
}

/** The picture with less colour of its own, so that a map's colours stand out from it; with none for a grey map.
 * @param {HTMLCanvasElement} base @param {number} [less] */
export function paintGround(base, less = PALER) {
  const canvas = blankCanvas(base.width, base.height);
  const ctx = contextOf(canvas);
  ctx.drawImage(base, 0, 0);
  ctx.globalCompositeOperation = "saturation";
  ctx.fillStyle = `rgba(128, 128, 128, ${less})`;
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

/** What maps are painted on, at one size: the picture, with less colour, and with none for grey maps.
 * @param {PictureMap} map @param {CanvasImageSource | null} picture @param {number} width */
export function groundsOf(map, picture, width) {
  const base = paintBase(map, picture, width, (width * map.height) / map.width);
  return { base, ground: paintGround(base), pale: paintGround(base, 1) };
}

/** @param {CanvasRenderingContext2D} ctx @param {Scene} scene @param {number} dot device pixels per CSS pixel */
export function paintScene(ctx, scene, dot) {
  const { width, height } = ctx.canvas;
  const k = width / scene.map.width;
  const square = scaled(modelSquare(scene.map), k);
  ctx.globalAlpha = 1;
  ctx.drawImage(scene.base, 0, 0, width, height);
  if (scene.heat) {
    ctx.globalAlpha = scene.opacity;
    if (!scene.spotlight) ctx.drawImage(scene.ground, 0, 0, width, height);
    ctx.imageSmoothingEnabled = scene.smooth;
    ctx.drawImage(scene.heat, square[0], square[1], square[2] - square[0], square[3] - square[1]);
    ctx.globalAlpha = 1;
  }
  if (!scene.smooth) paintGrid(ctx, scene.map, square, dot);
  paintLights(ctx, scene.map, scene, dot);
}

/** What is selected, dragged over and pointed at, over a picture that is already painted.
 * @param {CanvasRenderingContext2D} ctx @param {PictureMap} map
 * @param {{selected: Set<number>, dragging: number[], hover: number, cursor: number}} lights @param {number} dot */
export function paintLights(ctx, map, { selected, dragging, hover, cursor }, dot) {
  const k = ctx.canvas.width / map.width;
  if (selected.size) paintSelection(ctx, map, selected, k, dot);
  if (dragging.length) paintLines(ctx, outline(map, new Set(dragging)), k, dot, [4 * dot, 3 * dot]);
  for (const patch of new Set([cursor, hover])) if (patch >= 0) paintLines(ctx, outline(map, new Set([patch])), k, dot, []);
}

/** The picture the reader takes home: question, answer, picture with its map, legend, what made it; on white.
 * @param {Scene} scene
 * @param {{question: string, answer: string, title: string, caption: string, ends: string[],
 *   colors: Uint8Array, mean: string}} text */
export function paintFigure(scene, text) {
  const margin = 48;
  const side = 1200;
  const k = Math.min(side / scene.map.width, side / scene.map.height);
  const w = Math.round(scene.map.width * k);
  const h = Math.round(scene.map.height * k);
  const canvas = blankCanvas(Math.max(w, 900) + 2 * margin, h + 340);
  const ctx = contextOf(canvas);
  const room = canvas.width - 2 * margin;
  ctx.fillStyle = "#ffffff";
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  write(ctx, text.question, margin, 74, 36, "#111827", "600", room);
  write(ctx, text.answer, margin, 122, 30, "#374151", "400", room);
  const inner = blankCanvas(w, h);
  paintScene(contextOf(inner), { ...scene, hover: -1, cursor: -1, dragging: [] }, 2);
  ctx.drawImage(inner, margin, 156);
  write(ctx, text.title, margin, h + 204, 24, "#111827", "600", room);
  paintLegend(ctx, text.colors, text.mean, scene.opacity, margin, h + 222, Math.min(w, 640), 20);
  write(ctx, text.ends[0], margin, h + 272, 22, "#374151", "400", room);
  const last = text.ends[1];
  ctx.font = fontOf(22, "400");
  write(ctx, last, margin + Math.min(w, 640) - ctx.measureText(last).width, h + 272, 22, "#374151", "400", room);
  write(ctx, text.caption, margin, h + 312, 20, "#6b7280", "400", room);
  return canvas;
}

/** The scale as it looks on this picture: its colours at this opacity over the picture's mean colour.
 * @param {CanvasRenderingContext2D} ctx @param {Uint8Array} colors RGBA @param {string} mean @param {number} opacity
 * @param {number} x @param {number} y @param {number} width @param {number} height */
export function paintLegend(ctx, colors, mean, opacity, x, y, width, height) {
  const count = colors.length / 4;
  ctx.fillStyle = mean;
  ctx.fillRect(x, y, width, height);
  for (let i = 0; i < width; i++) {
    const c = 4 * Math.min(count - 1, Math.floor((i / width) * count));
    ctx.fillStyle = `rgba(${colors[c]}, ${colors[c + 1]}, ${colors[c + 2]}, ${(opacity * colors[c + 3]) / 255})`;
    ctx.fillRect(x + i, y, 1, height);
  }
}

/** @param {HTMLCanvasElement} canvas @returns {string} the mean colour, for CSS */
export function meanColor(canvas) {
  const small = blankCanvas(16, 16);
  const ctx = contextOf(small);
  ctx.imageSmoothingQuality = "high";
  ctx.drawImage(canvas, 0, 0, 16, 16);
  const sum = [0, 0, 0];
  ctx.getImageData(0, 0, 16, 16).data.forEach((value, i) => i % 4 < 3 && (sum[i % 4] += value / 256));
  return `rgb(${sum.map(Math.round).join(", ")})`;
}

/** @param {Box} box @param {number} k @returns {Box} */
function scaled(box, k) {
  return [box[0] * k, box[1] * k, box[2] * k, box[3] * k];
}

/** @param {CanvasRenderingContext2D} ctx @param {Box} box */
function hatch(ctx, [left, top, right, bottom]) {
  const gap = Math.max(7, ctx.canvas.width / 60);
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, right - left, bottom - top);
  ctx.clip();
  ctx.fillStyle = "rgba(17, 20, 28, 0.68)";
  ctx.fillRect(left, top, right - left, bottom - top);
  ctx.strokeStyle = "rgba(255, 255, 255, 0.22)";
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let x = left - (bottom - top); x < right; x += gap) {
    ctx.moveTo(x, bottom);
    ctx.lineTo(x + bottom - top, top);
  }
  ctx.stroke();
  label(ctx, "not seen", (left + right) / 2, (top + bottom) / 2, right - left, bottom - top);
  ctx.restore();
}

/** A word in the middle of a strip, turned where the strip is tall, left out where it would not fit.
 * @param {CanvasRenderingContext2D} ctx @param {string} text
 * @param {number} x @param {number} y @param {number} width @param {number} height */
function label(ctx, text, x, y, width, height) {
  const size = Math.min(Math.max(11, ctx.canvas.width / 48), 0.7 * Math.min(width, height));
  if (size < 9) return;
  ctx.font = fontOf(size, "600");
  const long = ctx.measureText(text).width + size;
  if (long > Math.max(width, height)) return;
  ctx.translate(x, y);
  if (long > width) ctx.rotate(-Math.PI / 2);
  ctx.fillStyle = "rgba(17, 20, 28, 0.9)";
  ctx.fillRect(-long / 2, -0.75 * size, long, 1.5 * size);
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  ctx.fillStyle = "rgba(255, 255, 255, 0.92)";
  ctx.fillText(text, 0, 0);
}

/** @param {CanvasRenderingContext2D} ctx @param {PictureMap} map @param {Box} square @param {number} dot */
function paintGrid(ctx, map, [left, top, right, bottom], dot) {
  if ((right - left) / map.cols < FINEST * dot) return; // lines would hide what they part
  ctx.beginPath();
  for (let i = 0; i <= map.cols; i++) {
    const x = Math.round(left + ((right - left) * i) / map.cols);
    ctx.moveTo(x, top);
    ctx.lineTo(x, bottom);
  }
  for (let i = 0; i <= map.rows; i++) {
    const y = Math.round(top + ((bottom - top) * i) / map.rows);
    ctx.moveTo(left, y);
    ctx.lineTo(right, y);
  }
  ctx.setLineDash([]);
  ctx.lineWidth = Math.max(1, dot / 2);
  ctx.strokeStyle = "rgba(255, 255, 255, 0.2)";
  ctx.stroke();
}

/** @param {CanvasRenderingContext2D} ctx @param {PictureMap} map @param {Set<number>} selected
 * @param {number} k @param {number} dot */
function paintSelection(ctx, map, selected, k, dot) {
  ctx.fillStyle = "rgba(255, 255, 255, 0.18)";
  for (const patch of selected) {
    const [left, top, right, bottom] = scaled(clipToPicture(map, patchBox(map, patch)), k);
    ctx.fillRect(left, top, right - left, bottom - top);
  }
  paintLines(ctx, outline(map, selected), k, dot, []);
}

/** White lines with a dark casing, so that they show on any picture.
 * @param {CanvasRenderingContext2D} ctx @param {Box[]} lines @param {number} k @param {number} dot @param {number[]} dash */
function paintLines(ctx, lines, k, dot, dash) {
  ctx.beginPath();
  for (const [x0, y0, x1, y1] of lines) {
    ctx.moveTo(x0 * k, y0 * k);
    ctx.lineTo(x1 * k, y1 * k);
  }
  ctx.lineCap = "square";
  ctx.setLineDash([]);
  ctx.strokeStyle = CASING;
  ctx.lineWidth = 4 * dot;
  ctx.stroke();
  ctx.setLineDash(dash);
  ctx.strokeStyle = WHITE;
  ctx.lineWidth = 2 * dot;
  ctx.stroke();
}

/** @param {number} size @param {string} weight */
function fontOf(size, weight) {
  return `${weight} ${Math.round(size)}px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif`;
}

/** @param {CanvasRenderingContext2D} ctx @param {string} text @param {number} x @param {number} y
 * @param {number} size @param {string} color @param {string} weight @param {number} room */
export function write(ctx, text, x, y, size, color, weight, room) {
  ctx.font = fontOf(size, weight);
  ctx.fillStyle = color;
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  let shown = text;
  while (shown.length > 1 && ctx.measureText(shown).width > room) shown = `${shown.slice(0, -2).trimEnd()}…`;
  ctx.fillText(shown, x, y, room);
}
