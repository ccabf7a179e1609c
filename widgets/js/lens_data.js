// @ts-check
/**
 * A lens as the page holds it: typed tables in one buffer, words looked up in them, one quantity at a time to colour the
 * picture with. A probability is (level / 65535)². Pure; knows no page.
 */

import { patchName } from "./shared/grid.js";
import { bytesOf, position, shareText } from "./shared/maps.js";

/**
 * @typedef {import("./shared/maps.js").Shown} Shown
 * @typedef {{question: string, answer: string, model: string, seed: number, map: import("./shared/grid.js").PictureMap,
 *   states: number[], top: number, vocabulary: number, lenses: string[], words: string[], pieces: string[],
 *   near: {top: number, space: string, centered: boolean} | null, notes: string[], picture: string, opacity: number,
 *   palettes: Record<string, string>, parts: Record<string, [string, number, number]>}} LensSpec
 * @typedef {Uint16Array | Uint32Array} Whole
 * @typedef {{spec: LensSpec, kind: string, states: number, cells: number, top: number, texts: string[], ids: Whole, probs: Uint16Array,
 *   entropy: Uint16Array, wordProbs: Uint16Array, wordRanks: Whole, nearIds: Whole, cosines: Int16Array,
 *   norms: Float32Array}} Lens tables row-major: state, patch, place among the top (or number of the word)
 * @typedef {{word: string, kind: "asked" | "kept" | "none", column: number, pieces: Set<number>, values: Float32Array,
 *   places: number, best: number}} FoundWord `best` is state * patches + patch
 * @typedef {{key: string, name: string, values: Float32Array, lo: number, hi: number, curve: Float32Array, most: boolean,
 *   found: FoundWord | null, text: (value: number) => string}} Quantity `curve` is per state, the highest patch or the mean
 * @typedef {{text: string, closest: string[]}} WordStatus
 */

const ROOTS = 65535;
const COSINES = 32767;
/** @type {Record<string, any>} */
const NUMBERS = { u2: Uint16Array, u4: Uint32Array, i2: Int16Array, f4: Float32Array };
const SUGGESTED = 5;
const SPOKEN = 3; // words of a patch that are read out

/** What a lens is called. @type {Record<string, string>} */
export const LENSES = { logit: "logit lens", tuned: "tuned lens", jacobian: "Jacobian lens" };

/** One of the lenses in the buffer, by default the first.
 * @param {DataView | Uint8Array} data @param {LensSpec} spec @param {string} [kind] @returns {Lens} */
export function readLens(data, spec, kind = spec.lenses[0]) {
  const { buffer } = bytesOf(data).slice(); // typed arrays must start on a multiple of their size
  const part = (/** @type {string} */ name) => {
    const [kind, start, count] = spec.parts[name] ?? ["u2", 0, 0];
    return new NUMBERS[kind](buffer, start, count);
  };
  const own = (/** @type {string} */ name) => part(kind === spec.lenses[0] ? name : `${name}@${kind}`);
  return {
    ...{ spec, kind, states: spec.states.length, cells: spec.map.rows * spec.map.cols, top: spec.top },
    texts: spec.pieces.map(plainPiece),
    ...{ ids: own("ids"), probs: own("probs"), entropy: own("entropy") },
    ...{ wordProbs: own("word_probs"), wordRanks: own("word_ranks") },
    ...{ nearIds: part("near_ids"), cosines: part("cosines"), norms: part("norms") },
  };
}

/** A piece as it is read: without the space before it, with signs for what cannot be seen.
 * @param {string} piece */
export function plainPiece(piece) {
  return piece.trim() || (piece.includes("\n") ? "↵" : piece ? "␣" : "∅");
}

/** @param {number} level */
export function rootProbability(level) {
  return (level / ROOTS) ** 2;
}

/** The likeliest pieces of one patch at one state.
 * @param {Lens} lens @param {number} state index @param {number} patch */
export function topPieces(lens, state, patch) {
  const start = (state * lens.cells + patch) * lens.top;
  return Array.from({ length: lens.top }, (_, i) => {
    return { piece: lens.ids[start + i], value: rootProbability(lens.probs[start + i]) };
  });
}

/** The pieces that are likeliest at most patches of a state, as shares of patches.
 * @param {Lens} lens @param {number} state index */
export function commonest(lens, state) {
  const start = state * lens.cells * lens.top;
  return shares(lens.cells, lens.top, (patch) => lens.ids[start + patch * lens.top]);
}

/** The same of the nearest words. @param {Lens} lens */
export function commonestNear(lens) {
  const top = lens.spec.near?.top ?? 0;
  return shares(lens.cells, top, (patch) => lens.nearIds[patch * top]);
}

/** @param {number} cells @param {number} count @param {(patch: number) => number} pieceOf */
function shares(cells, count, pieceOf) {
  const counts = new Map();
  for (let patch = 0; patch < cells; patch++) counts.set(pieceOf(patch), (counts.get(pieceOf(patch)) ?? 0) + 1);
  const order = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, count);
  return order.map(([piece, times]) => ({ piece, value: times / cells }));
}

/** Where a word is, and how probable: everywhere if the lens was asked for it, else among the top words kept.
 * @param {Lens} lens @param {string} given @returns {FoundWord} */
export function findWord(lens, given) {
  const word = given.trim();
  const count = lens.states * lens.cells;
  const values = new Float32Array(count);
  const column = lens.spec.words.findIndex((one) => one.trim() === word);
  const pieces = new Set(piecesOf(lens, word));
  const width = lens.spec.words.length;
  let [best, places] = [0, 0];
  for (let i = 0; i < count; i++) {
    if (column >= 0) values[i] = rootProbability(lens.wordProbs[i * width + column]);
    else if (pieces.size) values[i] = keptProbability(lens, i, pieces);
    if (values[i] > values[best]) best = i;
    if (values[i] > 0) places += 1;
  }
  return { word, kind: column >= 0 ? "asked" : pieces.size ? "kept" : "none", column, pieces, values, places, best };
}

/** @param {Lens} lens @param {number} at @param {Set<number>} pieces */
function keptProbability(lens, at, pieces) {
  let sum = 0;
  for (let i = at * lens.top; i < (at + 1) * lens.top; i++) if (pieces.has(lens.ids[i])) sum += rootProbability(lens.probs[i]);
  return sum;
}

/** The pieces that read so among those kept by the lens; where none does, those that differ in case alone.
 * @param {Lens} lens @param {string} word */
export function piecesOf(lens, word) {
  if (!word) return [];
  const alike = (/** @type {(text: string) => boolean} */ same) => lens.texts.flatMap((text, i) => (same(text) ? [i] : []));
  const kept = keptPieces(lens);
  const exact = alike((text) => text === word).filter((i) => kept[i]);
  const lower = word.toLowerCase();
  return exact.length ? exact : alike((text) => text.toLowerCase() === lower).filter((i) => kept[i]);
}

/** Which pieces occur among the top words; others are nearest words only.
 * @param {Lens} lens */
export function keptPieces(lens) {
  const kept = new Uint8Array(lens.texts.length);
  for (const piece of lens.ids) kept[piece] = 1;
  return kept;
}

/** What a word that is not there may have meant: known texts of least distance, those that begin alike first.
 * @param {string} word @param {string[]} texts @param {number} count */
export function closestTexts(word, texts, count) {
  const wanted = word.toLowerCase();
  const far = (/** @type {string} */ text) => {
    const lower = text.toLowerCase();
    if (lower.startsWith(wanted) || (lower.length > 1 && wanted.startsWith(lower))) return 0.5;
    return Math.abs(lower.length - wanted.length) > 2 ? 99 : editDistance(wanted, lower);
  };
  const near = [...new Set(texts)].map((text) => ({ text, far: far(text) }));
  const good = near.filter((one) => one.far <= Math.max(1, wanted.length / 2));
  good.sort((a, b) => a.far - b.far || Math.abs(a.text.length - word.length) - Math.abs(b.text.length - word.length));
  return good.slice(0, count).map(({ text }) => text);
}

/** Letters to add, drop or change. @param {string} a @param {string} b */
export function editDistance(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + Number(a[i - 1] !== b[j - 1]));
    }
    row = next;
  }
  return row[b.length];
}

/** @param {Lens} lens @param {FoundWord} found @returns {Quantity} */
export function wordQuantity(lens, found) {
  const { word, values, best } = found;
  const rest = { values, lo: 0, hi: values[best], curve: perState(lens, values, true), most: true, found };
  const left = found.kind === "asked" ? "0%" : `not in the top ${lens.top}`; // what is not kept need not be nothing
  return { key: `word ${word}`, name: `“${word}”`, ...rest, text: (value) => (value > 0 ? shareText(value) : left) };
}

/** How undecided each patch is, in nats. @param {Lens} lens @returns {Quantity} */
export function entropyQuantity(lens) {
  const step = Math.log(lens.spec.vocabulary) / ROOTS;
  const values = Float32Array.from(lens.entropy, (level) => level * step);
  const text = (/** @type {number} */ value) => `${value.toFixed(2)} nats`;
  return { ...plainQuantity(lens, "entropy", values), lo: values.reduce((a, b) => Math.min(a, b), Infinity), text };
}

/** The probability of each patch's likeliest word. @param {Lens} lens @returns {Quantity} */
export function sureQuantity(lens) {
  const values = Float32Array.from({ length: lens.states * lens.cells }, (_, i) => rootProbability(lens.probs[i * lens.top]));
  return plainQuantity(lens, "probability of the likeliest word", values);
}

/** @param {Lens} lens @param {string} name @param {Float32Array} values @returns {Quantity} */
function plainQuantity(lens, name, values) {
  const hi = values.reduce((a, b) => Math.max(a, b), 0);
  return { key: name, name, values, lo: 0, hi, curve: perState(lens, values, false), most: false, found: null, text: shareText };
}

/** The highest patch of each state, or the mean over its patches.
 * @param {Lens} lens @param {Float32Array} values @param {boolean} most */
function perState(lens, values, most) {
  return Float32Array.from({ length: lens.states }, (_, state) => {
    const row = values.subarray(state * lens.cells, (state + 1) * lens.cells);
    return most ? row.reduce((a, b) => Math.max(a, b), 0) : row.reduce((a, b) => a + b, 0) / lens.cells;
  });
}

/** A quantity at one state, as it is painted.
 * @param {Lens} lens @param {Quantity} quantity @param {number} state index @param {boolean} own colours of this state alone
 * @returns {Shown} */
export function lensMap(lens, quantity, state, own) {
  const row = quantity.values.subarray(state * lens.cells, (state + 1) * lens.cells);
  let [lo, hi] = [quantity.lo, quantity.hi];
  if (own) [lo, hi] = [quantity.lo && Math.min(...row), Math.max(...row)];
  return {
    key: [lens.kind, quantity.key, state, lo, hi].join(),
    levels: Uint8Array.from(row, (value) => Math.round(255 * position(value, lo, hi))),
    signed: false,
    fine: (hi - lo) / 255,
    floor: 0,
    ends: [quantity.text(lo), "", hi > lo ? quantity.text(hi) : ""],
    value: (cell) => row[cell],
    at: (cell) => position(row[cell], lo, hi),
    table: (palette) => new Uint32Array(palette.slice().buffer),
  };
}

/** The nearest words of one patch. @param {Lens} lens @param {number} patch */
export function nearPieces(lens, patch) {
  const top = lens.spec.near?.top ?? 0;
  return Array.from({ length: top }, (_, i) => {
    return { piece: lens.nearIds[patch * top + i], value: lens.cosines[patch * top + i] / COSINES };
  });
}

/** A state by its number, in the words of the library.
 * @param {number} state */
export function stateName(state) {
  return state === 0 ? "what the connector gives" : `after ${state} layer${state === 1 ? "" : "s"}`;
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
  if (kind === "none") {
    const never = `“${word}” is never among the top ${lens.top}, at no patch and no state.`;
    const text = `${never} Words that the lens was asked for are known everywhere.`;
    return { text, closest: closestTexts(word, knownTexts(lens), SUGGESTED) };
  }
  const patch = best % lens.cells;
  const state = lens.spec.states[Math.floor(best / lens.cells)];
  const rank = kind === "asked" ? `, rank ${grouped(rankAt(lens, found, best))}` : "";
  const most = `likeliest at state ${state}, ${patchName(lens.spec.map, patch)}: ${shareText(found.values[best])}${rank}`;
  if (kind === "asked") return { text: `“${word}” is ${most}. Its probability is known everywhere.`, closest: [] };
  const several = found.pieces.size > 1 ? ` (${found.pieces.size} tokens read so; summed)` : "";
  const partly = `only where it is among the top ${lens.top}`;
  const count = `${grouped(places)} of ${grouped(lens.states * lens.cells)} places`;
  return { text: `“${word}”${several} is shown ${partly}: ${count}, ${most}.`, closest: [] };
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
  return `at most ${shareText(last)}: not in the top ${lens.top}`;
}

/** A patch at a state, for a screen reader.
 * @param {Lens} lens @param {number} patch @param {number} state index @param {boolean} locked */
export function spokenPatch(lens, patch, state, locked) {
  const words = topPieces(lens, state, patch).slice(0, SPOKEN);
  const said = words.map(({ piece, value }) => `${lens.texts[piece]} ${shareText(value)}`).join(", ");
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
