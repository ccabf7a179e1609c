// @ts-check
/**
 * What is to be seen, worked out from the data and the reader's state: which map, which colours, which words
 * say so. Pure; the types of the explorer's data live here.
 */

import { chipText } from "./chips.js";
import { patchName } from "./grid.js";
import { findMap, formatValue, levelsOf, rangeOf, strongest, valueOf } from "./maps.js";

/**
 * @typedef {import("./grid.js").PictureMap} PictureMap
 * @typedef {import("./maps.js").Method} Method
 * @typedef {{opacity: number, smooth: boolean, ownScale: boolean, spotlight: boolean}} Display
 * @typedef {{question: string, answer: string, model: string, seed: number, p: number | null, can_ask: boolean,
 *   chips: {text: string, kind: string, p: number | null}[], map: PictureMap, methods: Method[], picture: string,
 *   palettes: Record<string, string>, opacity: number, smooth: boolean}} Spec
 * @typedef {{id?: number, state?: string, selected: number[], answer?: string, words?: {text: string, p: number | null}[],
 *   p?: number | null, message?: string, trace?: string, heard?: boolean}} Reply
 * @typedef {{word: number, method: string, layer: number, selected: Set<number>, peekWord: number, peekMethod: number,
 *   focus: number, display: Display, busy: boolean, mean: string}} State
 * @typedef {{map: PictureMap, maps: import("./maps.js").Maps, method: Method, methodIndex: number, pickedMethod: number,
 *   word: number, chip: number, layer: number, found: import("./maps.js").Found | null, lo: number, hi: number, offset: number,
 *   step: number, display: Display, palette: string, title: string, said: string, focus: number,
 *   selected: Set<number>, busy: boolean, mean: string}} View
 * @typedef {{root: HTMLElement, update: (view: View) => void}} Part
 */

/** @param {Spec} spec @param {import("./maps.js").Maps} maps @param {State} state @returns {View} */
export function viewOf(spec, maps, state) {
  const { display, word } = state;
  const pickedMethod = Math.max(
    0,
    spec.methods.findIndex((method) => method.name === state.method),
  );
  const methodIndex = state.peekMethod >= 0 ? state.peekMethod : pickedMethod;
  const method = spec.methods[methodIndex];
  const chip = state.peekWord >= 0 ? state.peekWord : word;
  const layer = Math.min(state.layer, method.layers.length - 1);
  const found = findMap(method, chip, layer);
  const [lo, hi] = found && display.ownScale ? rangeOf(maps, found.index, method.signed) : [method.lo, method.hi];
  const offset = found ? maps.scales[2 * found.index] : 0;
  const step = found ? maps.scales[2 * found.index + 1] : 0;
  const what = chipText(spec.chips[chip]);
  const title = [method.name, `“${what}”`, method.layers.length > 1 ? method.layers[layer] : ""].filter(Boolean).join(" · ");
  const said = missing(method, found, what);
  const colors = method.signed ? "diverging" : "sequential";
  const palette = display.spotlight ? (method.signed ? "light-diverging" : "light") : colors;
  const { focus, selected, busy, mean } = state;
  const shown = { method, methodIndex, pickedMethod, word, chip, layer, found, lo, hi, offset, step, title, said, palette };
  return { map: spec.map, maps, display, focus, selected, busy, mean, ...shown };
}

/** A map in words, for a screen reader.
 * @param {View} view */
export function summary({ found, title, said, step, maps, map }) {
  if (!found) return said;
  const best = strongest(levelsOf(maps, found.index), 3);
  const places = best.map((patch) => `${patchName(map, patch)}: ${formatValue(valueOf(maps, found.index, patch), step)}`);
  return `${title}. ${said} Strongest: ${places.join("; ")}.`;
}

/** One patch in words.
 * @param {View} view @param {number} patch */
export function patchSummary({ found, step, maps, map, selected }, patch) {
  const value = found ? `, ${formatValue(valueOf(maps, found.index, patch), step)}` : "";
  return patchName(map, patch) + value + (selected.has(patch) ? ", selected" : "");
}

/** @param {Method} method @param {import("./maps.js").Found | null} found @param {string} what */
function missing(method, found, what) {
  if (!found) return `${method.name} has no map for “${what}”.`;
  return found.own ? "" : `${method.name} has no map of its own for “${what}”: this is its map for the whole answer.`;
}
