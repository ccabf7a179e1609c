// @ts-check
/**
 * A map as it is to be seen: in which colours, and in words for a screen reader. Pure; the types of the explorer's data
 * live here.
 */

import { onPicture, patchName } from "./grid.js";
import { isNegligible, mapText, strongest } from "./maps.js";

/**
 * @typedef {import("./grid.js").PictureMap} PictureMap
 * @typedef {import("./maps.js").Method} Method
 * @typedef {{opacity: number, smooth: boolean, ownScale: boolean, spotlight: boolean}} Display
 * @typedef {{question: string, answer: string, model: string, seed: number, p: number | null, can_ask: boolean, cut?: boolean, told?: string[], knows?: string,
 *   chips: {text: string, kind: string, p: number | null}[], map: PictureMap, methods: Method[], picture: string,
 *   palettes: Record<string, string>, opacity: number, smooth: boolean}} Spec
 * @typedef {{id?: number, state?: string, selected: number[], answer?: string, words?: {text: string, p: number | null}[],
 *   p?: number | null, message?: string, trace?: string, heard?: boolean}} Reply
 * @typedef {{map: PictureMap, method: Method, methodIndex: number, pickedMethod: number, word: number, chip: number,
 *   layer: number, shown: import("./maps.js").Shown | null, display: Display, palette: string, title: string, said: string,
 *   scaleSaid: string, caption: string, focus: number, selected: Set<number>, busy: boolean, mean: string}} View
 * @typedef {{map: PictureMap, shown: import("./maps.js").Shown | null, palette: string, mean: string, title: string,
 *   scaleSaid: string, caption: string, said: string, focus: number, selected: Set<number>,
 *   display: {opacity: number, smooth: boolean, spotlight: boolean}}} MapView what is read beside any one map
 * @typedef {{root: HTMLElement, update: (view: View) => void}} Part
 */

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
  if (isNegligible(shown)) return `${title}. ${said}`;
  const best = strongest(shown.levels, shown.levels.length).filter((patch) => onPicture(map, patch)).slice(0, 3);
  const places = best.map((patch) => `${patchName(map, patch)}: ${mapText(shown, patch)}`);
  return `${title}. ${said} Strongest: ${places.join("; ")}.`;
}

/** One patch in words.
 * @param {MapView} view @param {number} patch */
export function patchSummary({ shown, map, selected }, patch) {
  const value = shown ? `, ${mapText(shown, patch)}` : "";
  return patchName(map, patch) + value + (selected.has(patch) ? ", selected" : "");
}
