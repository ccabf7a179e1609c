// @ts-check
/**
 * What is to be seen, worked out from the data and the reader's state: which map, which colours, which words
 * say so. Pure; the types of the explorer's data live here.
 */

import { patchName } from "./grid.js";
import { findMap, formatValue, linearMap, rangeOf, strongest } from "./maps.js";
import { chipText } from "./parts.js";

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
 * @typedef {{map: PictureMap, method: Method, methodIndex: number, pickedMethod: number, word: number, chip: number,
 *   layer: number, shown: import("./maps.js").Shown | null, display: Display, palette: string, title: string, said: string,
 *   scaleSaid: string, caption: string, focus: number, selected: Set<number>, busy: boolean, mean: string}} View
 * @typedef {{map: PictureMap, shown: import("./maps.js").Shown | null, palette: string, mean: string, title: string,
 *   scaleSaid: string, caption: string, said: string, focus: number, selected: Set<number>,
 *   display: {opacity: number, smooth: boolean, spotlight: boolean}}} MapView what is read beside any one map
 * @typedef {{root: HTMLElement, update: (view: View) => void}} Part
 */

const DOUBT = "Grey: this map was not shown to beat random ones.";

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
  const what = chipText(spec.chips[chip]);
  const { focus, selected, busy, mean } = state;
  return {
    ...{ map: spec.map, method, methodIndex, pickedMethod, word, chip, layer, display, focus, selected, busy, mean },
    shown: found && linearMap(maps, found.index, lo, hi, method.signed),
    palette: paletteOf(method.signed, doubtful(method, found), display.spotlight),
    title: [method.name, `“${what}”`, method.layers.length > 1 ? method.layers[layer] : ""].filter(Boolean).join(" · "),
    said: [missing(method, found, what), doubtful(method, found) ? DOUBT : ""].filter(Boolean).join(" "),
    scaleSaid: display.ownScale ? "colours of this map alone" : "one colour scale for all words",
    caption: method.caption,
  };
}

/** @param {boolean} signed @param {boolean} doubt @param {boolean} spotlight */
export function paletteOf(signed, doubt, spotlight) {
  if (spotlight) return signed ? "light-diverging" : "light";
  if (doubt) return signed ? "grey-diverging" : "grey";
  return signed ? "diverging" : "sequential";
}

/** Was a map judged, and not shown to beat random ones?
 * @param {Method} method @param {import("./maps.js").Found | null} found */
export function doubtful(method, found) {
  return found !== null && method.beats[found.target] === false;
}

/** A map in words, for a screen reader.
 * @param {MapView} view */
export function summary({ shown, title, said, map }) {
  if (!shown) return said;
  const best = strongest(shown.levels, 3);
  const places = best.map((patch) => `${patchName(map, patch)}: ${formatValue(shown.value(patch), shown.fine)}`);
  return `${title}. ${said} Strongest: ${places.join("; ")}.`;
}

/** One patch in words.
 * @param {MapView} view @param {number} patch */
export function patchSummary({ shown, map, selected }, patch) {
  const value = shown ? `, ${formatValue(shown.value(patch), shown.fine)}` : "";
  return patchName(map, patch) + value + (selected.has(patch) ? ", selected" : "");
}

/** @param {Method} method @param {import("./maps.js").Found | null} found @param {string} what */
function missing(method, found, what) {
  if (!found) return `${method.name} has no map for “${what}”.`;
  return found.own ? "" : `${method.name} has no map of its own for “${what}”: this is its map for the whole answer.`;
}
