// @ts-check
/**
 * The two plots of FlowView. The sweep's curves: a line per flow, its name at its end, the zero line, the window under
 * the pointer as a band; marks differ in shape as well as in colour, and are empty where a change does not reach its
 * noise floor. The heat map of patching: a row per site, a column per window of layers, each cell's share written in it
 * where it fits, a dot where it does not reach the noise floor; zero is grey, one deep orange, below zero blue, and what
 * was not measured is crossed out.
 */

import { every, plotText } from "./shared/plot.js";
import { niceTicks, rangeWithZero, reachOf, scoreText } from "./flow_data.js";

/**
 * @typedef {import("./flow_data.js").Spot} Spot
 * @typedef {import("./shared/plot.js").Sheet} Sheet
 * @typedef {{rows: number[][], open: boolean[], names: string[], centres: number[], windows: [number, number][],
 *   title: string, unit: string, colors: string[], floor: number}} CurveView
 * @typedef {{left: number, right: number, top: number, bottom: number, lo: number, hi: number, first: number,
 *   last: number}} Frame
 * @typedef {{rows: number[][], sites: string[], windows: [number, number][], colors: Uint8Array,
 *   floor: number}} CellView
 * @typedef {{left: number, top: number, wide: number, high: number, rows: number, columns: number}} CellFrame
 */

const DASHES = [[], [7, 4], [2, 3]]; // where there are more flows than colours
const LEFT = 52;
const CURVES_TOP = 24;
const CURVES_BOTTOM = 42;
const NAMES = 144; // for the names beside the lines' ends
const NAME_GAP = 15;
const NEAR = 36; // CSS pixels from a mark at which it is meant
const MISSING = 11; // above the axis, where what was not measured is marked
const SITES_ROOM = 78; // CSS pixels for the sites' names
const CELLS_TOP = 24;
const CELLS_BOTTOM = 42;
const CELL_HIGHEST = 58;
const CELL_LEAST = 4;
const CELLS_TALLEST = 400;
const FITS = 30; // a cell this wide has room for its number

/** @param {CurveView} view @param {number} width @param {number} height @returns {Frame} */
export function frameOf({ rows, open, windows }, width, height) {
  const [lo, hi] = rangeWithZero(rows.filter((_, i) => open[i]));
  const names = Math.min(NAMES, 0.32 * width);
  const layers = windows.flat();
  const [first, last] = [Math.min(...layers), Math.max(...layers) - 1];
  return { left: LEFT, right: width - names, top: CURVES_TOP, bottom: height - CURVES_BOTTOM, lo, hi, first, last };
}

/** @param {Frame} frame @param {number} layer */
export function layerX({ left, right, first, last }, layer) {
  return left + ((layer - first + 0.5) / (last - first + 1)) * (right - left);
}

/** @param {Frame} frame @param {number} value */
export function valueY({ top, bottom, lo, hi }, value) {
  return bottom - ((value - lo) / (hi - lo)) * (bottom - top);
}

/** The nearest mark to a place, or null where none is near: the nearest window first, then the nearest flow of it.
 * @param {CurveView} view @param {Frame} frame @param {number} x @param {number} y @returns {Spot | null} */
export function nearestMark(view, frame, x, y) {
  if (x < frame.left - NEAR || x > frame.right + NEAR || !view.centres.length) return null;
  const away = view.centres.map((centre) => Math.abs(layerX(frame, centre) - x));
  const window = away.indexOf(Math.min(...away));
  let best = /** @type {Spot | null} */ (null);
  let least = Infinity;
  view.rows.forEach((row, flow) => {
    if (!view.open[flow]) return;
    const far = Math.abs(markY(frame, row[window]) - y);
    if (far < least) [best, least] = [[flow, window], far];
  });
  return best;
}

/** @param {Frame} frame @param {number} value */
function markY(frame, value) {
  return Number.isFinite(value) ? valueY(frame, value) : frame.bottom - MISSING;
}

/** @param {Sheet} sheet @param {CurveView} view @param {Spot | null} hover @param {Spot | null} kept */
export function paintCurves(sheet, view, hover, kept) {
  const { ctx } = sheet;
  const frame = frameOf(view, sheet.width, sheet.height);
  const shown = hover ?? kept;
  if (shown) paintBand(sheet, frame, view.windows[shown[1]]);
  paintAxes(sheet, frame, view);
  const order = view.rows.map((_, i) => i).filter((i) => view.open[i]);
  if (hover) order.sort((a, b) => Number(a === hover[0]) - Number(b === hover[0])); // what is pointed at lies above
  for (const flow of order) {
    ctx.globalAlpha = hover && hover[0] !== flow ? 0.35 : 1;
    paintLine(sheet, frame, view, flow, hover?.[0] === flow);
  }
  ctx.globalAlpha = 1;
  paintNames(sheet, frame, view, hover);
  for (const [spot, size] of /** @type {[Spot | null, number][]} */ ([[kept, 8], [hover, 7]])) {
    if (!spot || !view.open[spot[0]]) continue;
    ctx.beginPath();
    ctx.arc(layerX(frame, view.centres[spot[1]]), markY(frame, view.rows[spot[0]][spot[1]]), size, 0, 7);
    ctx.strokeStyle = sheet.ink;
    ctx.lineWidth = 1.75;
    ctx.stroke();
  }
}

/** The layers of a window. @param {Sheet} sheet @param {Frame} frame @param {[number, number]} window */
function paintBand({ ctx, ink }, frame, [start, stop]) {
  const half = (frame.right - frame.left) / (frame.last - frame.first + 1) / 2;
  const x = layerX(frame, start) - half;
  ctx.globalAlpha = 0.08;
  ctx.fillStyle = ink;
  ctx.fillRect(x, frame.top, layerX(frame, stop - 1) + half - x, frame.bottom - frame.top);
  ctx.globalAlpha = 1;
}

/** @param {Sheet} sheet @param {Frame} frame @param {CurveView} view */
function paintAxes(sheet, frame, view) {
  const { ctx, ink } = sheet;
  for (const value of niceTicks(frame.lo, frame.hi, 5)) {
    const y = Math.round(valueY(frame, value)) + 0.5;
    ctx.globalAlpha = value === 0 ? 0.7 : 0.13;
    ctx.strokeStyle = ink;
    ctx.lineWidth = 1;
    strokePath(ctx, [[frame.left, y], [frame.right, y]]);
    const said = `${value > 0 ? "+" : ""}${String(value).replace("-", "−")}${view.unit}`;
    plotText(sheet, value === 0 ? "0" : said, frame.left - 8, y, { align: "right" });
  }
  ctx.globalAlpha = 1;
  const size = (frame.right - frame.left) / (frame.last - frame.first + 1);
  const gap = every(size, 20);
  for (let layer = frame.first; layer <= frame.last; layer += gap) {
    plotText(sheet, `${layer}`, layerX(frame, layer), frame.bottom + 13, { align: "center" });
  }
  const middle = (frame.left + frame.right) / 2;
  plotText(sheet, "layer (centre of the window that is cut)", middle, frame.bottom + 31, { align: "center", room: frame.right });
  plotText(sheet, view.title, 2, 8, { room: sheet.width - 4 });
}

/** @param {Sheet} sheet @param {Frame} frame @param {CurveView} view @param {number} flow @param {boolean} strong */
function paintLine({ ctx, paper }, frame, view, flow, strong) {
  const color = view.colors[flow % view.colors.length];
  ctx.strokeStyle = color;
  ctx.fillStyle = color;
  ctx.lineWidth = strong ? 3.2 : 2.2;
  ctx.lineJoin = "round";
  ctx.setLineDash(DASHES[Math.floor(flow / view.colors.length) % DASHES.length]);
  let part = /** @type {[number, number][]} */ ([]);
  const row = view.rows[flow];
  row.forEach((value, w) => {
    if (Number.isFinite(value)) part.push([layerX(frame, view.centres[w]), valueY(frame, value)]);
    else [part] = [[], strokePath(ctx, part)]; // a gap where nothing was measured
  });
  strokePath(ctx, part);
  ctx.setLineDash([]);
  row.forEach((value, w) => {
    const x = layerX(frame, view.centres[w]);
    const empty = value === 0 && view.floor > 0; // nothing that can be told from rounding
    if (Number.isFinite(value)) flowMark(ctx, empty ? paper : color, flow, x, valueY(frame, value), empty ? color : paper);
    else flowCross(ctx, x + 7 * (flow % view.colors.length) - 7, frame.bottom - MISSING);
  });
}

/** Names at the lines' ends, pushed apart where they would meet.
 * @param {Sheet} sheet @param {Frame} frame @param {CurveView} view @param {Spot | null} hover */
function paintNames(sheet, frame, view, hover) {
  const last = view.rows.map((row) => row.findLastIndex(Number.isFinite));
  const wanted = last.map((w, i) => (w < 0 ? frame.bottom : valueY(frame, view.rows[i][w])));
  const shown = view.rows.map((_, i) => i).filter((i) => view.open[i]);
  const places = spreadOut(shown.map((i) => wanted[i]), NAME_GAP, frame.top, frame.bottom);
  const { ctx } = sheet;
  shown.forEach((flow, i) => {
    const color = view.colors[flow % view.colors.length];
    const from = last[flow] < 0 ? frame.right : layerX(frame, view.centres[last[flow]]) + 8;
    const faded = hover !== null && hover[0] !== flow;
    ctx.globalAlpha = faded ? 0.25 : 0.6;
    ctx.strokeStyle = color;
    ctx.lineWidth = 1;
    strokePath(ctx, [[from, wanted[flow]], [frame.right + 6, places[i]]]);
    ctx.globalAlpha = faded ? 0.4 : 1;
    flowMark(ctx, color, flow, frame.right + 10, places[i], sheet.paper);
    ctx.globalAlpha = 1;
    const how = { size: 12, weight: "600", alpha: faded ? 0.45 : 0.95, room: sheet.width - frame.right - 18 };
    plotText(sheet, view.names[flow], frame.right + 18, places[i], how);
  });
}

/** Places as near to those wanted as a gap between them allows, in the order given.
 * @param {number[]} wanted @param {number} gap @param {number} low @param {number} high @returns {number[]} */
export function spreadOut(wanted, gap, low, high) {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
  const out = [...wanted];
  let before = low - gap;
  for (const i of order) before = out[i] = Math.max(out[i], before + gap);
  let after = high + gap;
  for (const i of order.reverse()) after = out[i] = Math.min(out[i], after - gap);
  return out;
}

/** @param {CanvasRenderingContext2D} ctx @param {string} color @param {number} flow @param {number} x
 * @param {number} y @param {string} rim */
function flowMark(ctx, color, flow, x, y, rim) {
  const r = 4.2;
  ctx.beginPath();
  const shape = flow % 4;
  if (shape === 0) ctx.arc(x, y, r, 0, 7);
  else if (shape === 1) ctx.rect(x - r + 0.4, y - r + 0.4, 2 * r - 0.8, 2 * r - 0.8);
  else {
    const points = shape === 2 ? [[0, -1.3], [1.2, 0.9], [-1.2, 0.9]] : [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]];
    points.forEach(([dx, dy], i) => (i ? ctx.lineTo(x + r * dx, y + r * dy) : ctx.moveTo(x + r * dx, y + r * dy)));
    ctx.closePath();
  }
  ctx.fillStyle = color;
  ctx.fill();
  ctx.strokeStyle = rim;
  ctx.lineWidth = 1.2;
  ctx.stroke();
}

/** @param {CanvasRenderingContext2D} ctx @param {number} x @param {number} y */
function flowCross(ctx, x, y) {
  ctx.lineWidth = 1.6;
  strokePath(ctx, [[x - 3, y - 3], [x + 3, y + 3]]);
  strokePath(ctx, [[x - 3, y + 3], [x + 3, y - 3]]);
}

/** @param {CanvasRenderingContext2D} ctx @param {number[][]} points */
function strokePath(ctx, points) {
  ctx.beginPath();
  points.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  ctx.stroke();
}

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
  view.rows.forEach((row, s) => row.forEach((value, w) => paintCell(sheet, frame, [s, w], value, color(value), view.floor)));
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

/** @param {Sheet} sheet @param {CellFrame} frame @param {Spot} spot @param {number} value @param {number[]} color
 * @param {number} floor */
function paintCell(sheet, frame, [s, w], value, color, floor) {
  const { ctx } = sheet;
  const [x, y] = [frame.left + w * frame.wide, frame.top + s * frame.high];
  const [wide, high] = [frame.wide - (frame.wide > 9 ? 1 : 0), frame.high - (frame.high > 9 ? 1 : 0)];
  if (!Number.isFinite(value)) return paintHole(sheet, x, y, wide, high);
  ctx.fillStyle = `rgb(${color.join(", ")})`;
  ctx.fillRect(x, y, wide, high);
  if (wide < FITS || high < 16) return;
  const dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140;
  const how = /** @type {const} */ ({ align: "center", alpha: 1, color: dark ? "#ffffff" : "#16181d" });
  plotText(sheet, value === 0 && floor > 0 ? "·" : scoreText(value), x + wide / 2, y + high / 2 + 0.5, how);
}

/** @param {Sheet} sheet @param {number} x @param {number} y @param {number} wide @param {number} high */
function paintHole({ ctx, ink }, x, y, wide, high) {
  ctx.globalAlpha = 0.35;
  ctx.strokeStyle = ink;
  ctx.lineWidth = 1;
  ctx.strokeRect(x + 0.5, y + 0.5, wide - 1, high - 1);
  strokePath(ctx, [[x, y + high], [x + wide, y]]);
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
