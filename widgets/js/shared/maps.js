// @ts-check
/**
 * Relevance maps as Python sends them: uint8 levels, and one (offset, step) pair per map
 * (value = offset + level * step). Finds, reads and colours them. Knows no page.
 */

/**
 * @typedef {{name: string, control: boolean, signed: boolean, lo: number, hi: number, first: number, targets: number,
 *   layers: string[], chips: number[], whole: number, caption: string, notes: string[],
 *   beats: (boolean | null)[], floors?: number[]}} Method `beats` says of each target whether its map beats random ones;
 *   null: not known. `floors`: what rounding alone may change in each target's score; what is below it came as 0
 * @typedef {{levels: Uint8Array, scales: Float32Array, cells: number}} Maps
 * @typedef {{index: number, target: number, own: boolean}} Found
 * @typedef {{key: string, levels: Uint8Array, signed: boolean, fine: number, ends: [string, string, string],
 *   floor: number, value: (cell: number) => number, at: (cell: number) => number, table: (palette: Uint8Array) => Uint32Array}} Shown
 *   one map as it is to be painted: its levels, the colour of each, its real values, and where each lies on the scale (0..1)
 */

/** Bytes as the widget protocol (DataView) or our own page (Uint8Array) hands them over; no copy.
 * @param {DataView | Uint8Array} view */
export function bytesOf(view) {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** @param {DataView | Uint8Array} levels @param {DataView | Uint8Array} scales @param {number} cells @returns {Maps} */
export function readMaps(levels, scales, cells) {
  const aligned = bytesOf(scales).slice(); // a Float32Array must start on a multiple of four
  return { levels: bytesOf(levels), scales: new Float32Array(aligned.buffer), cells };
}

/** The map of a chip, or the whole answer's where the method has none of its own, or null.
 * @param {Method} method @param {number} chip @param {number} layer @returns {Found | null} */
export function findMap(method, chip, layer) {
  const own = method.chips[chip];
  const target = own >= 0 ? own : method.whole;
  if (target < 0) return null;
  return { index: method.first + layer * method.targets + target, target, own: own >= 0 };
}

/** @param {Maps} maps @param {number} index */
export function levelsOf(maps, index) {
  return maps.levels.subarray(index * maps.cells, (index + 1) * maps.cells);
}

/** @param {Maps} maps @param {number} index @param {number} cell */
export function valueOf(maps, index, cell) {
  return maps.scales[2 * index] + maps.scales[2 * index + 1] * maps.levels[index * maps.cells + cell];
}

/** Lowest and highest value of one map; centred on zero for a signed method.
 * @param {Maps} maps @param {number} index @param {boolean} signed @returns {[number, number]} */
export function rangeOf(maps, index, signed) {
  const levels = levelsOf(maps, index);
  let low = 255;
  let high = 0;
  for (const level of levels) {
    if (level < low) low = level;
    if (level > high) high = level;
  }
  const offset = maps.scales[2 * index];
  const step = maps.scales[2 * index + 1];
  if (!signed) return [offset + low * step, offset + high * step];
  const reach = Math.max(Math.abs(offset + low * step), Math.abs(offset + high * step));
  return [-reach, reach];
}

/** Cells from strongest to weakest, the first `count` of them; earlier cells first among equals.
 * @param {Uint8Array} levels @param {number} count */
export function strongest(levels, count) {
  return Array.from(levels.keys())
    .sort((a, b) => levels[b] - levels[a] || a - b)
    .slice(0, count);
}

/** @param {string} hex @returns {Uint8Array} RGBA of 256 colours */
export function readPalette(hex) {
  return Uint8Array.from({ length: hex.length / 2 }, (_, i) => parseInt(hex.slice(2 * i, 2 * i + 2), 16));
}

/** @param {Record<string, string>} given */
export function readPalettes(given) {
  return Object.fromEntries(Object.entries(given).map(([name, hex]) => [name, readPalette(hex)]));
}

/** Where a value lies in a range, 0..1; the middle of an empty range for signed maps, else its start.
 * @param {number} value @param {number} lo @param {number} hi */
export function position(value, lo, hi) {
  if (hi <= lo) return lo < 0 ? 0.5 : 0;
  return Math.min(1, Math.max(0, (value - lo) / (hi - lo)));
}

/** The colour of each of a map's 256 levels, so that painting is one look-up per cell.
 * @param {Uint8Array} palette @param {(level: number) => number} along where a level lies on the scale, 0..1 */
export function colorTable(palette, along) {
  const table = new Uint8Array(4 * 256);
  for (let level = 0; level < 256; level++) {
    const color = Math.round(255 * along(level));
    table.set(palette.subarray(4 * color, 4 * color + 4), 4 * level);
  }
  return new Uint32Array(table.buffer);
}

/** A map under a range of values; `floor` is its noise floor.
 * @param {Maps} maps @param {number} index @param {number} lo @param {number} hi @param {boolean} signed
 * @param {number} [floor] @returns {Shown} */
export function linearMap(maps, index, lo, hi, signed, floor = 0) {
  const [offset, step] = [maps.scales[2 * index], maps.scales[2 * index + 1]];
  const value = (/** @type {number} */ cell) => valueOf(maps, index, cell);
  return {
    key: [index, lo, hi].join(),
    levels: levelsOf(maps, index),
    signed,
    fine: step,
    floor,
    ends: [formatValue(lo, (hi - lo) / 255), signed ? "0" : "", formatValue(hi, (hi - lo) / 255)],
    value,
    at: (cell) => position(value(cell), lo, hi),
    table: (palette) => colorTable(palette, (level) => position(offset + level * step, lo, hi)),
  };
}

/** Levels between patch centres, `zoom` samples per patch side, edges held; row-major.
 * @param {Uint8Array} levels @param {number} rows @param {number} cols @param {number} zoom */
export function smoothLevels(levels, rows, cols, zoom) {
  const out = new Uint8Array(rows * cols * zoom * zoom);
  const width = cols * zoom;
  for (let y = 0; y < rows * zoom; y++) {
    const gy = Math.min(rows - 1, Math.max(0, (y + 0.5) / zoom - 0.5));
    const top = Math.min(Math.floor(gy), Math.max(0, rows - 2));
    const below = Math.min(rows - 1, top + 1);
    for (let x = 0; x < width; x++) {
      const gx = Math.min(cols - 1, Math.max(0, (x + 0.5) / zoom - 0.5));
      const left = Math.min(Math.floor(gx), Math.max(0, cols - 2));
      const right = Math.min(cols - 1, left + 1);
      const upper = levels[top * cols + left] * (1 - gx + left) + levels[top * cols + right] * (gx - left);
      const lower = levels[below * cols + left] * (1 - gx + left) + levels[below * cols + right] * (gx - left);
      out[y * width + x] = Math.round(upper * (1 - gy + top) + lower * (gy - top));
    }
  }
  return out;
}

/** Three significant figures, a true minus sign, powers of ten only where they are needed.
 * @param {number} value */
export function formatNumber(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return text.replaceAll("-", "−").replace("e+", "e");
}

/** A value no finer than its map can tell: as many decimals as the map's step warrants.
 * @param {number} value @param {number} step */
export function formatValue(value, step) {
  if (!(step > 0)) return formatNumber(value);
  const decimals = Math.max(0, Math.round(-Math.log10(step)));
  if (Math.round(value / step) === 0) return "0";
  return decimals > 5 ? formatNumber(value) : value.toFixed(decimals).replace("-", "−");
}

/** What a map says of a cell: a number, or "negligible" where nothing reaches its noise floor.
 * @param {Shown} shown @param {number} cell */
export function mapText(shown, cell) {
  const text = formatValue(shown.value(cell), shown.fine);
  return shown.floor > 0 && text === "0" ? "negligible" : text;
}

export const NEGLIGIBLE = "No patch here reaches the noise floor: the effect is negligible.";

/** Whether no cell of a map reaches its noise floor, so that there is nothing to see in it.
 * @param {Shown | null} shown */
export function isNegligible(shown) {
  return shown !== null && shown.floor > 0 && shown.levels.every((_, cell) => mapText(shown, cell) === "negligible");
}

/** A share of attention, or a probability that may be nothing. @param {number} share */
export function shareText(share) {
  return share > 0 ? formatPercent(share) : "0%";
}

/** @param {number | null} p */
export function formatPercent(p) {
  if (p === null || p === undefined) return "";
  if (p >= 0.9995) return "100%";
  if (p < 0.001) return "<0.1%";
  return p >= 0.995 || p < 0.0995 ? `${(100 * p).toFixed(1)}%` : `${Math.round(100 * p)}%`;
}
