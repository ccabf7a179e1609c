// @ts-check
/**
 * An answer as the explorer of the widgets takes it: its words with their probabilities, and one map for each word and method
 * in the very form in which Python packs them. Pure.
 */

import { attentionRows, meanRow, rolloutMap, rolloutRows, sumOf } from "./rollout.js";

/**
 * @typedef {import("./engine.js").Answer} Answer
 * @typedef {import("./tokenizer.js").AnswerWord} AnswerWord
 * @typedef {{name: string, control: boolean, caption: string, notes: string[], maps: ArrayLike<number>[]}} MethodMaps one map for each
 *   word, then one for the whole answer
 */

const STEPS = 127; // on either side of zero
const LEVELS = 255;

/** The way from a picture's pixels to the square's, as Python's PictureMap of a padded picture.
 * @param {number} width @param {number} height @param {number} size @param {number} rows */
export function mapOf(width, height, size, rows) {
  const side = Math.max(width, height);
  const scale = size / side;
  const [left, top] = [Math.floor((side - width) / 2), Math.floor((side - height) / 2)];
  return {
    ...{ width, height, size, rows, cols: rows, mode: "pad", scale_x: scale, scale_y: scale },
    ...{ offset_x: left * scale, offset_y: top * scale },
  };
}

/** Token spans that are explained: the words, then the whole answer. @param {AnswerWord[]} words @param {number} tokens */
export function spansOf(words, tokens) {
  return [...words.map(({ start, stop }) => [start, stop]), [0, tokens]];
}

/** The maps that one pass through the model gives. @param {Answer} answer @param {AnswerWord[]} words
 * @param {Record<string, string>} truths what each method says of itself @returns {MethodMaps[]} */
export function mapsOf(answer, words, truths) {
  const tokens = answer.ids.length - answer.prompt;
  const spans = spansOf(words, tokens);
  const attention = attentionRows(answer, tokens);
  const rollout = rolloutRows(answer, tokens);
  const random = seeded(1);
  const patches = answer.image[1] - answer.image[0];
  return [
    {
      ...{ name: "rollout", control: false, caption: truths.rollout },
      notes: ["Natural log of the ratio to uniform causal attention: 0 is what the mask alone would give."],
      maps: spans.map(([start, stop]) => rolloutMap(rollout, start, stop)),
    },
    {
      ...{ name: "attention", control: false, caption: truths.attention, notes: ["Mean over all layers and heads."] },
      maps: spans.map(([start, stop]) => meanRow(attention, start, stop)),
    },
    {
      ...{ name: "random", control: true, caption: truths.random, notes: [] },
      maps: spans.map(() => Float64Array.from({ length: patches }, random)),
    },
  ];
}

/** How much of each word's score is lost with each patch. @param {number[]} whole of every token
 * @param {number[][]} without the same for each patch @param {number[][]} spans @returns {Float64Array[]} */
export function dropsOf(whole, without, spans) {
  return spans.map(([start, stop]) => Float64Array.from(without, (some) => sumOf(whole, start, stop) - sumOf(some, start, stop)));
}

/** Levels, (offset, step) of each map, and the range of colours over all. @param {ArrayLike<number>[]} maps */
export function quantised(maps) {
  const all = maps.map((map) => Array.from(map));
  const signed = Math.min(...all.flat()) < 0;
  const scales = new Float32Array(2 * all.length);
  const levels = new Uint8Array(all.length * all[0].length);
  const peaks = all.map((map) => Math.max(...map.map(Math.abs)));
  all.forEach((map, i) => {
    const step = signed ? peaks[i] / STEPS : (Math.max(...map) - Math.min(...map)) / LEVELS;
    const offset = signed ? -(STEPS + 1) * step : Math.min(...map);
    scales.set([offset, step], 2 * i);
    levels.set(map.map((value) => Math.round((value - offset) / (step || 1))), i * map.length);
  });
  const reach = Math.max(...peaks);
  const [lo, hi] = signed ? [-reach, reach] : [Math.min(...all.flat()), Math.max(...all.flat())];
  return { levels, scales, signed, lo, hi };
}

/** What the explorer is given. @param {MethodMaps[]} methods @param {number} chips */
export function packed(methods, chips) {
  let first = 0;
  const parts = methods.map(({ name, control, caption, notes, maps }) => {
    const { levels, scales, signed, lo, hi } = quantised(maps);
    const about = {
      ...{ name, control, signed, lo, hi, first, targets: maps.length, layers: [""], caption, notes },
      ...{ chips: [...Array(chips).keys()], whole: chips - 1, beats: new Array(chips).fill(null) },
    };
    first += maps.length;
    return { about, levels, scales };
  });
  return { methods: parts.map(({ about }) => about), maps: joined(parts.map(({ levels }) => levels)), scales: joined(parts.map(({ scales }) => scales)) };
}

/** @param {(Uint8Array | Float32Array)[]} parts @returns {Uint8Array} their bytes, one after the other */
function joined(parts) {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    out.set(new Uint8Array(part.buffer, part.byteOffset, part.byteLength), at);
    at += part.byteLength;
  }
  return out;
}

/** The same numbers for the same seed, 0 to 1 (mulberry32). @param {number} seed */
export function seeded(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
