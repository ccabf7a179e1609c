// @ts-check
/**
 * What the lens says in words: of a state, of a patch, of the word that was typed and of how much is known of it. Pure.
 */

import { patchName } from "./grid.js";
import { chanceText, closestTexts, keptPieces, topPieces } from "./lens_data.js";

/**
 * @typedef {import("./lens_data.js").Lens} Lens
 * @typedef {import("./lens_data.js").FoundWord} FoundWord
 * @typedef {import("./lens_data.js").Quantity} Quantity
 * @typedef {{text: string, closest: string[]}} WordStatus
 */

const SUGGESTED = 5;
const SPOKEN = 3; // words of a patch that are read out

/** A state by its number, in the words of the library.
 * @param {number} state */
export function stateName(state) {
  return state === 0 ? "what the projector gives" : `after ${state} layer${state === 1 ? "" : "s"}`;
}

/** @param {Lens} lens */
export function countPlaces(lens) {
  return grouped(lens.states * lens.cells);
}

/** @param {number} count */
export function grouped(count) {
  return String(count).replaceAll(/\B(?=(\d{3})+$)/g, ",");
}

/** Where a word lights up and how much is known of it.
 * @param {Lens} lens @param {FoundWord | null} found @returns {WordStatus} */
export function wordStatus(lens, found) {
  if (!found) return { text: "Type a word to see where, and at which state, the picture's tokens say it.", closest: [] };
  const { word, kind, best, places } = found;
  if (kind === "none") return { text: neverText(lens, word), closest: closestTexts(word, knownTexts(lens), SUGGESTED) };
  const patch = best % lens.cells;
  const state = lens.spec.states[Math.floor(best / lens.cells)];
  const rank = kind === "asked" ? `, rank ${grouped(rankAt(lens, found, best))}` : "";
  const most = `likeliest at state ${state}, ${patchName(lens.spec.map, patch)}: ${chanceText(found.values[best])}${rank}`;
  if (kind === "asked") return { text: `“${word}” is ${most}. Its probability is known everywhere.`, closest: [] };
  const several = found.pieces.size > 1 ? ` (${found.pieces.size} tokens read so; summed)` : "";
  const partly = `only where it is among the top ${lens.top}`;
  const count = `${grouped(places)} of ${countPlaces(lens)} places`;
  return { text: `“${word}”${several} is shown ${partly}: ${count}, ${most}.`, closest: [] };
}

/** @param {Lens} lens @param {string} word */
function neverText(lens, word) {
  const ask = "Words that the lens was asked for are known everywhere.";
  return `“${word}” is never among the top ${lens.top}, at no patch and no state. ${ask}`;
}

/** Texts that can be looked for: words the lens was asked for, then all pieces it kept.
 * @param {Lens} lens @returns {string[]} */
export function knownTexts(lens) {
  const kept = keptPieces(lens);
  const texts = lens.texts.filter((text, i) => kept[i] && /[\p{L}\p{N}]/u.test(text));
  return [...new Set([...lens.spec.words.map((word) => word.trim()), ...texts.sort((a, b) => (a < b ? -1 : 1))])];
}

/** @param {Lens} lens @param {FoundWord} found @param {number} at state * patches + patch */
function rankAt(lens, found, at) {
  return lens.wordRanks[at * lens.spec.words.length + found.column];
}

/** The value shown at one patch, with its rank, or the bound where it is not known.
 * @param {Lens} lens @param {Quantity} quantity @param {number} state index @param {number} patch */
export function valueText(lens, quantity, state, patch) {
  const at = state * lens.cells + patch;
  const { found } = quantity;
  const said = quantity.text(quantity.values[at]);
  if (!found) return said;
  if (found.kind === "asked") return `${said}, rank ${grouped(rankAt(lens, found, at))} of ${grouped(lens.spec.vocabulary)}`;
  if (quantity.values[at] > 0) return said;
  const last = topPieces(lens, state, patch)[lens.top - 1].value;
  return `at most ${chanceText(last)}: not in the top ${lens.top}`;
}

/** A patch at a state, for a screen reader.
 * @param {Lens} lens @param {number} patch @param {number} state index @param {boolean} locked */
export function spokenPatch(lens, patch, state, locked) {
  const words = topPieces(lens, state, patch).slice(0, SPOKEN);
  const said = words.map(({ piece, value }) => `${lens.texts[piece]} ${chanceText(value)}`).join(", ");
  const norm = lens.norms.length ? ` Norm ${lens.norms[patch].toFixed(1)}.` : "";
  const where = patchName(lens.spec.map, patch) + (locked ? ", locked" : "");
  return `${where}. State ${lens.spec.states[state]}: ${said}.${norm}`;
}

/** A state, for a screen reader. @param {Lens} lens @param {Quantity} quantity @param {number} state index */
export function spokenState(lens, quantity, state) {
  const number = lens.spec.states[state];
  const what = quantity.most ? "highest" : "mean";
  return `State ${number}, ${stateName(number)}. ${quantity.name}: ${what} ${quantity.text(quantity.curve[state])}.`;
}
