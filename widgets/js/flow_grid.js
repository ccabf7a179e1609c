// @ts-check
/**
 * The heat map of patching: a row per site, a column per window of layers, each cell's share written in it where it fits.
 * Zero is grey, one deep orange, below zero blue. What was not measured is crossed out.
 */

import { reachOf, scoreText } from "./flow_data.js";
import { every, plotText } from "./flow_plot.js";

/**
 * @typedef {import("./flow_data.js").Spot} Spot
 * @typedef {import("./flow_plot.js").Sheet} Sheet
 * @typedef {{rows: number[][], sites: string[], windows: [number, number][], colors: Uint8Array}} CellView
 * @typedef {{left: number, top: number, wide: number, high: number, rows: number, columns: number}} CellFrame
 */

const SITES_ROOM = 78; // CSS pixels for the sites' names
const CELLS_TOP = 24;
const CELLS_BOTTOM = 42;
const CELL_HIGHEST = 58;
const CELL_LEAST = 4;
const CELLS_TALLEST = 400;
const FITS = 30; // a cell this wide has room for its number

/** @param {number} rows @param {number} columns @param {number} width @returns {CellFrame} */
export function cellFrame(rows, columns, width) {
  const left = Math.min(SITES_ROOM, 0.3 * width);
  const high = Math.max(CELL_LEAST, Math.min(CELL_HIGHEST, Math.floor(CELLS_TALLEST / rows)));
  return { left, top: CELLS_TOP, wide: (width - left - 2) / columns, high, rows, columns };
}

/** @param {number} rows @param {number} columns @param {number} width */
export function cellsHeight(rows, columns, width) {
  return CELLS_TOP + rows * cellFrame(rows, columns, width).high + CELLS_BOTTOM;
}

/** @param {CellFrame} frame @param {number} x @param {number} y @returns {Spot | null} */
export function spotAt({ left, top, wide, high, rows, columns }, x, y) {
  const [row, column] = [Math.floor((y - top) / high), Math.floor((x - left) / wide)];
  return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
}

/** The colour of a share: RGB. @param {Uint8Array} colors RGBA @param {number} value @param {number} reach */
export function shareColor(colors, value, reach) {
  const place = 4 * Math.round((255 * (Math.min(1, Math.max(-1, value / reach)) + 1)) / 2);
  return [colors[place], colors[place + 1], colors[place + 2]];
}

/** @param {Sheet} sheet @param {CellView} view @param {Spot | null} hover @param {Spot | null} kept */
export function paintCells(sheet, view, hover, kept) {
  const { ctx, ink, paper } = sheet;
  const frame = cellFrame(view.sites.length, view.windows.length, sheet.width);
  const reach = reachOf(view.rows);
  const color = (/** @type {number} */ value) => shareColor(view.colors, value, reach);
  view.rows.forEach((row, s) => row.forEach((value, w) => paintCell(sheet, frame, [s, w], value, color(value))));
  paintCellAxes(sheet, frame, view);
  for (const [spot, width] of /** @type {[Spot | null, number][]} */ ([[kept, 2.5], [hover, 1.5]])) {
    if (!spot) continue;
    const [x, y] = [frame.left + spot[1] * frame.wide, frame.top + spot[0] * frame.high];
    for (const [color, size] of /** @type {[string, number][]} */ ([[paper, width + 2.5], [ink, width]])) {
      ctx.strokeStyle = color;
      ctx.lineWidth = size;
      ctx.strokeRect(x + 1, y + 1, frame.wide - 3, frame.high - 3);
    }
  }
}

/** @param {Sheet} sheet @param {CellFrame} frame @param {Spot} spot @param {number} value @param {number[]} color */
function paintCell(sheet, frame, [s, w], value, color) {
  const { ctx } = sheet;
  const [x, y] = [frame.left + w * frame.wide, frame.top + s * frame.high];
  const [wide, high] = [frame.wide - (frame.wide > 9 ? 1 : 0), frame.high - (frame.high > 9 ? 1 : 0)];
  if (!Number.isFinite(value)) return paintHole(sheet, x, y, wide, high);
  ctx.fillStyle = `rgb(${color.join(", ")})`;
  ctx.fillRect(x, y, wide, high);
  if (wide < FITS || high < 16) return;
  const dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140;
  const how = /** @type {const} */ ({ align: "center", alpha: 1, color: dark ? "#ffffff" : "#16181d" });
  plotText(sheet, scoreText(value), x + wide / 2, y + high / 2 + 0.5, how);
}

/** @param {Sheet} sheet @param {number} x @param {number} y @param {number} wide @param {number} high */
function paintHole({ ctx, ink }, x, y, wide, high) {
  ctx.globalAlpha = 0.35;
  ctx.strokeStyle = ink;
  ctx.lineWidth = 1;
  ctx.strokeRect(x + 0.5, y + 0.5, wide - 1, high - 1);
  ctx.beginPath();
  ctx.moveTo(x, y + high);
  ctx.lineTo(x + wide, y);
  ctx.stroke();
  ctx.globalAlpha = 1;
}

/** @param {Sheet} sheet @param {CellFrame} frame @param {CellView} view */
function paintCellAxes(sheet, frame, view) {
  const bottom = frame.top + frame.rows * frame.high;
  for (let s = 0; s < frame.rows; s += every(frame.high, 13)) {
    const how = /** @type {const} */ ({ align: "right", size: 12, alpha: 0.9, room: frame.left - 8 });
    plotText(sheet, view.sites[s], frame.left - 8, frame.top + (s + 0.5) * frame.high, how);
  }
  const names = view.windows.map(([start, stop]) => (stop - start === 1 ? `${start}` : `${start}–${stop - 1}`));
  const room = 8 + 7 * Math.max(...names.map((name) => name.length));
  for (let w = 0; w < frame.columns; w += every(frame.wide, room)) {
    plotText(sheet, names[w], frame.left + (w + 0.5) * frame.wide, bottom + 13, { align: "center" });
  }
  const middle = frame.left + (frame.columns * frame.wide) / 2;
  const several = view.windows.some(([start, stop]) => stop - start > 1);
  plotText(sheet, several ? "layers patched together" : "layer patched", middle, bottom + 31, { align: "center" });
  plotText(sheet, "share of the clean score brought back, by place", 2, 8, { room: sheet.width - 4 });
}
