// @ts-check
/**
 * Maps of an answer's words from what the model's layers attended to: attention and rollout, as Python's `llava_lab.attribute`
 * defines them with its own defaults. Pure.
 */

/** @typedef {Pick<import("./engine.js").Answer, "attention" | "sizes" | "image" | "prompt">} Looked */

const FLOOR = 1e-12; // as Python's: added to both sides of the log-ratio

/** Mean attention over layers and heads of each predicting position, (positions, patches).
 * @param {Looked} answer @param {number} tokens of the answer */
export function attentionRows(answer, tokens) {
  const [start, stop] = answer.image;
  return Array.from({ length: tokens }, (_, i) => {
    const layers = answer.attention[answer.prompt - 1 + i];
    return Float64Array.from({ length: stop - start }, (_, patch) => layers.reduce((sum, row) => sum + row[start + patch], 0) / layers.length);
  });
}

/** How each predicting position is mixed from the patches, and the same under uniform causal attention, (positions, patches).
 * The residual's weight is measured at each layer and position. @param {Looked} answer @param {number} tokens */
export function rolloutRows(answer, tokens) {
  const size = answer.prompt - 1 + tokens;
  const [start, stop] = answer.image;
  const width = stop; // what lies behind the picture is never asked for
  let total = identity(size, width);
  let even = identity(size, width);
  const layers = answer.attention[0].length;
  const mixed = new Float64Array(width);
  for (let layer = 0; layer < layers; layer++) {
    const nextTotal = /** @type {Float64Array[]} */ (new Array(size));
    const nextEven = /** @type {Float64Array[]} */ (new Array(size));
    const sum = new Float64Array(width);
    for (let i = 0; i < size; i++) {
      const [branch, stream] = answer.sizes[i][layer];
      const keep = branch + stream > 0 ? stream / (branch + stream) : 1;
      const row = answer.attention[i][layer];
      mixed.fill(0);
      for (let j = 0; j <= i; j++) {
        const weight = row[j];
        const below = total[j];
        for (let k = 0; k < width; k++) mixed[k] += weight * below[k];
      }
      nextTotal[i] = mixed.map((value, k) => value + keep * (total[i][k] - value));
      for (let k = 0; k < width; k++) sum[k] += even[i][k];
      nextEven[i] = sum.map((value, k) => value / (i + 1) + keep * (even[i][k] - value / (i + 1)));
    }
    total = nextTotal;
    even = nextEven;
  }
  const rows = (/** @type {Float64Array[]} */ whole) => whole.slice(answer.prompt - 1, size).map((row) => row.slice(start, stop));
  return { seen: rows(total), uniform: rows(even) };
}

/** Mean of the rows of a word's tokens [start, stop). @param {Float64Array[]} rows @param {number} start @param {number} stop */
export function meanRow(rows, start, stop) {
  const some = rows.slice(start, stop);
  return some[0].map((_, k) => some.reduce((sum, row) => sum + row[k], 0) / some.length);
}

/** Natural log of how much more a word is mixed from each patch than the mask alone would give.
 * @param {{seen: Float64Array[], uniform: Float64Array[]}} rows @param {number} start @param {number} stop */
export function rolloutMap(rows, start, stop) {
  const uniform = meanRow(rows.uniform, start, stop);
  return meanRow(rows.seen, start, stop).map((value, k) => Math.log((value + FLOOR) / (uniform[k] + FLOOR)));
}

/** Sum of an array's part: the log-probability of a word. @param {number[]} values @param {number} start @param {number} stop */
export function sumOf(values, start, stop) {
  return values.slice(start, stop).reduce((sum, value) => sum + value, 0);
}

/** @param {number} size @param {number} width */
function identity(size, width) {
  return Array.from({ length: size }, (_, i) => Float64Array.from({ length: width }, (_, k) => Number(i === k)));
}
