// @ts-check
/**
 * From a picture's pixels to the model's square, as Python's image processor does it: padded to a square of the mean colour,
 * reduced as Pillow reduces (bicubic, wider than a pixel where it makes smaller, 8 bits between the two directions), normalised.
 * Source: Pillow, src/libImaging/Resample.c. Knows no page.
 */

/**
 * @typedef {{data: Uint8Array, width: number, height: number}} Rgb three bytes a pixel, row-major
 * @typedef {{size: number, color: number[], mean: number[], std: number[]}} Square what Python says of the processor
 */

const BITS = 22; // of Pillow's fixed-point weights
const SUPPORT = 2; // pixels on either side that bicubic reads
const A = -0.5; // Pillow's bicubic

/** @param {number} x */
function bicubic(x) {
  const at = Math.abs(x);
  if (at < 1) return ((A + 2) * at - (A + 3)) * at * at + 1;
  return at < 2 ? (((at - 5) * at + 8) * at - 4) * A : 0;
}

/** For each pixel of the result: the first pixel read and the weights from there on.
 * @param {number} from @param {number} to */
function weightsOf(from, to) {
  const scale = from / to;
  const wide = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - SUPPORT * wide + 0.5));
    const stop = Math.min(from, Math.trunc(centre + SUPPORT * wide + 0.5));
    const plain = Array.from({ length: stop - first }, (_, k) => bicubic((k + first - centre + 0.5) * (1 / wide)));
    const total = plain.reduce((sum, value) => sum + value, 0);
    return { first, weights: plain.map((value) => Math.trunc((value / total) * 2 ** BITS + (value < 0 ? -0.5 : 0.5))) };
  });
}

/** One direction: `count` lines of pixels, `step` bytes from pixel to pixel and `line` from line to line.
 * @param {Uint8Array} from @param {ReturnType<typeof weightsOf>} weights @param {number} count
 * @param {{step: number, line: number}} inward @param {{step: number, line: number}} outward @param {Uint8Array} to */
function resample(from, weights, count, inward, outward, to) {
  for (let row = 0; row < count; row++) {
    for (let i = 0; i < weights.length; i++) {
      const { first, weights: some } = weights[i];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** (BITS - 1);
        let at = row * inward.line + first * inward.step + channel;
        for (let k = 0; k < some.length; k++, at += inward.step) sum += from[at] * some[k];
        to[row * outward.line + i * outward.step + channel] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** BITS)));
      }
    }
  }
}

/** A square picture at another size, exactly as Pillow makes it. @param {Rgb} picture @param {number} side @returns {Rgb} */
export function resized(picture, side) {
  const { width, height, data } = picture;
  if (width === side && height === side) return picture;
  const across = new Uint8Array(side * height * 3);
  resample(data, weightsOf(width, side), height, { step: 3, line: 3 * width }, { step: 3, line: 3 * side }, across);
  const out = new Uint8Array(side * side * 3);
  resample(across, weightsOf(height, side), side, { step: 3 * side, line: 3 }, { step: 3 * side, line: 3 }, out);
  return { data: out, width: side, height: side };
}

/** The picture in the middle of a square of `color`. @param {Rgb} picture @param {number[]} color @returns {Rgb} */
export function padded(picture, color) {
  const { width, height, data } = picture;
  if (width === height) return picture;
  const side = Math.max(width, height);
  const out = new Uint8Array(side * side * 3);
  for (let i = 0; i < out.length; i++) out[i] = color[i % 3];
  const [left, top] = [Math.floor((side - width) / 2), Math.floor((side - height) / 2)];
  for (let y = 0; y < height; y++) out.set(data.subarray(3 * y * width, 3 * (y + 1) * width), 3 * ((y + top) * side + left));
  return { data: out, width: side, height: side };
}

/** What the vision tower takes: (3, S, S), normalised. @param {Rgb} picture @param {Square} square */
export function normalised(picture, square) {
  const { size, color, mean, std } = square;
  const { data } = resized(padded(picture, color), size);
  const out = new Float32Array(3 * size * size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) out[c * size * size + i] = (data[3 * i + c] / 255 - mean[c]) / std[c];
  }
  return out;
}

/** The same with some patches in mid-grey. @param {Float32Array} pixels @param {Iterable<number>} patches @param {Square} square
 * @param {number} cols patches a row */
export function covered(pixels, patches, square, cols) {
  const { size, mean, std } = square;
  const out = pixels.slice();
  const side = size / cols;
  for (const patch of patches) {
    const [top, left] = [Math.floor(patch / cols) * side, (patch % cols) * side];
    for (let c = 0; c < 3; c++) {
      for (let y = top; y < top + side; y++) {
        const row = (c * size + y) * size + left;
        out.fill((0.5 - mean[c]) / std[c], row, row + side);
      }
    }
  }
  return out;
}

/** Canvas pixels on white, without their transparency. @param {ImageData} image @returns {Rgb} */
export function opaque({ data, width, height }) {
  const out = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) {
    const alpha = data[4 * i + 3];
    for (let c = 0; c < 3; c++) out[3 * i + c] = alpha === 255 ? data[4 * i + c] : Math.round((data[4 * i + c] * alpha + 255 * (255 - alpha)) / 255);
  }
  return { data: out, width, height };
}
