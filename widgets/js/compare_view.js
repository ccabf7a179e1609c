// @ts-check
/**
 * Many methods' maps of one target: which is shown how, in what order, and what is said of each. Pure.
 *
 * Methods have units of their own, so one slider sets the range of all as a share of each map's own range.
 * By rank, a colour means the same in every map: how many of the patches lie below.
 */

import { chipText } from "./chips.js";
import { patchName } from "./grid.js";
import { colorTable, findMap, formatNumber, formatValue, levelsOf, linearMap } from "./maps.js";
import { position, rangeOf, strongest, valueOf } from "./maps.js";
import { doubtful, paletteOf } from "./view.js";

/**
 * @typedef {import("./maps.js").Shown} Shown
 * @typedef {import("./maps.js").Maps} Maps
 * @typedef {import("./maps.js").Method & {scores: Record<string, (number | null)[]>}} ScoredMethod
 * @typedef {{name: string, group: string, lower: boolean}} Score
 * @typedef {{question: string, answer: string, model: string, seed: number, map: import("./grid.js").PictureMap,
 *   chips: {text: string, kind: string, p: number | null}[], methods: ScoredMethod[], scores: Score[], picture: string,
 *   palettes: Record<string, string>, opacity: number, smooth: boolean, agreement: number[][] | null,
 *   refused: [string, string][], notes: string[]}} CompareSpec
 * @typedef {{opacity: number, smooth: boolean, spotlight: boolean, ownScale: boolean, byRank: boolean,
 *   range: number}} CompareDisplay
 * @typedef {{method: ScoredMethod, index: number, target: number, shown: Shown | null, palette: string, doubt: boolean}} Tile
 */

export const ALIKE = "agreement"; // the order by likeness to the enlarged map

/** Every method's map of a target, in the order given.
 * @param {CompareSpec} spec @param {Maps} maps @param {number} chip @param {CompareDisplay} display @returns {Tile[]} */
export function tilesOf(spec, maps, chip, display) {
  return spec.methods.map((method, index) => {
    const found = findMap(method, chip, method.layers.length - 1);
    const own = found?.own ? found : null; // the whole answer's map would pass for this word's
    const doubt = doubtful(method, own);
    const signed = method.signed && !display.byRank;
    const palette = paletteOf(signed, doubt, display.spotlight);
    const shown = own && shownAs(maps, method, own.index, display);
    return { method, index, target: own ? own.target : -1, shown, palette, doubt };
  });
}

/** @param {Maps} maps @param {ScoredMethod} method @param {number} index @param {CompareDisplay} display @returns {Shown} */
function shownAs(maps, method, index, { byRank, ownScale, range }) {
  if (byRank) return rankedMap(maps, index, range);
  const [lo, hi] = ownScale ? rangeOf(maps, index, method.signed) : [method.lo, method.hi];
  if (method.signed) return linearMap(maps, index, lo * range, hi * range, true);
  return linearMap(maps, index, lo, lo + range * (hi - lo), false);
}

/** A map by rank: colours begin above the weakest patches and spread over the strongest `share` of them.
 * @param {Maps} maps @param {number} index @param {number} share @returns {Shown} */
export function rankedMap(maps, index, share) {
  const levels = levelsOf(maps, index);
  const ranks = ranksOf(levels);
  const most = Math.max(1, Math.round(share * maps.cells));
  return {
    key: [index, "rank", share].join(),
    levels,
    signed: false,
    fine: maps.scales[2 * index + 1],
    ends: [`${most} strongest of ${maps.cells} patches`, "", "the strongest"],
    value: (cell) => valueOf(maps, index, cell),
    at: (cell) => position(ranks[levels[cell]], 1 - share, 1),
    table: (palette) => rankTable(palette, ranks, share),
  };
}

/** For each level the share of patches below it, half of its equals counted: 0 to 1.
 * @param {Uint8Array} levels */
export function ranksOf(levels) {
  const counts = new Uint32Array(256);
  for (const level of levels) counts[level] += 1;
  const ranks = new Float64Array(256);
  for (let level = 0, below = 0; level < 256; below += counts[level], level++) {
    ranks[level] = levels.length > 1 ? (below + Math.max(0, counts[level] - 1) / 2) / (levels.length - 1) : 0.5;
  }
  return ranks;
}

/** @param {Uint8Array} palette @param {Float64Array} ranks @param {number} share */
function rankTable(palette, ranks, share) {
  const steps = Uint8Array.from(ranks, (rank) => Math.round(255 * position(rank, 1 - share, 1)));
  const plain = new Uint8Array(colorTable(palette, 0, 1, 0, 255).buffer);
  const table = new Uint8Array(4 * 256);
  steps.forEach((step, level) => {
    table.set(plain.subarray(4 * step, 4 * step + 4), 4 * level);
    if (ranks[level] < 1 - share) table[4 * level + 3] = 0; // the picture itself
  });
  return new Uint32Array(table.buffer);
}

/** A tile's score, or null where it has none.
 * @param {CompareSpec} spec @param {Tile} tile @param {string} name @param {number} stage the enlarged method */
export function scoreOf(spec, tile, name, stage) {
  if (name === ALIKE) return spec.agreement?.[stage]?.[tile.index] ?? null;
  return tile.target < 0 ? null : (tile.method.scores[name]?.[tile.target] ?? null);
}

/** Methods in the order of a score, the best first; those without it last, equals as given.
 * @param {CompareSpec} spec @param {Tile[]} tiles @param {string} name "" for the order given
 * @param {boolean} worstFirst @param {number} stage @returns {number[]} */
export function orderOf(spec, tiles, name, worstFirst, stage) {
  const lower = spec.scores.some((score) => score.name === name && score.lower);
  const way = lower === worstFirst ? -1 : 1;
  const key = tiles.map((tile) => (name ? scoreOf(spec, tile, name, stage) : null));
  return tiles
    .map((tile) => tile.index)
    .sort((a, b) => {
      const [x, y] = [key[a], key[b]];
      if (x === null || y === null) return Number(x === null) - Number(y === null) || a - b;
      return way * (x - y) || a - b;
    });
}

/** How much of a map's positive part lies on the selected patches, or null where it has none.
 * @param {Shown} shown @param {Set<number>} selected */
export function shareOf(shown, selected) {
  let [inside, all] = [0, 0];
  for (let cell = 0; cell < shown.levels.length; cell++) {
    const value = Math.max(0, shown.value(cell));
    all += value;
    if (selected.has(cell)) inside += value;
  }
  return all > 0 ? inside / all : null;
}

/** The second line of a tile: what it says about the patch pointed at, else about the selection, else about itself.
 * @param {CompareSpec} spec @param {Tile} tile @param {number} focus @param {Set<number>} selected @param {string} what */
export function lineOf(spec, tile, focus, selected, what) {
  const { shown, method } = tile;
  if (!shown) return `no map for “${what}”`;
  if (focus >= 0) return `${formatValue(shown.value(focus), shown.fine)} here, rank ${rankOf(shown.levels, focus)}`;
  if (selected.size) {
    const share = shareOf(shown, selected);
    return share === null ? "nothing anywhere" : `${Math.round(100 * share)}% in selection`;
  }
  if (tile.doubt) return "not shown to beat random";
  return method.control ? "control" : "";
}

/** A patch's place among all patches, the strongest first; equals share the best place.
 * @param {Uint8Array} levels @param {number} patch */
export function rankOf(levels, patch) {
  let above = 0;
  for (const level of levels) if (level > levels[patch]) above += 1;
  return above + 1;
}

/** Everything a screen reader should hear of a tile.
 * @param {CompareSpec} spec @param {Tile} tile @param {string} sort @param {number} stage @param {string} what */
export function tileName(spec, tile, sort, stage, what) {
  const score = sort ? scoreOf(spec, tile, sort, stage) : null;
  const best = tile.shown ? strongest(tile.shown.levels, 1).map((patch) => `strongest ${patchName(spec.map, patch)}`) : [];
  const said = [tile.method.name, tile.method.control ? "control" : "", score === null ? "" : `${sort} ${formatScore(score)}`];
  const doubt = tile.doubt ? "not shown to beat random" : "";
  return [...said, doubt, tile.shown ? "" : `no map for ${what}`, ...best].filter(Boolean).join(", ");
}

/** The methods most and least like one, in words; "" where that was not measured.
 * @param {CompareSpec} spec @param {number} stage */
export function alikeText(spec, stage) {
  const row = spec.agreement?.[stage];
  if (!row || row.length < 2) return "";
  const others = row.map((value, i) => ({ value, name: spec.methods[i].name, i })).filter(({ i }) => i !== stage);
  others.sort((a, b) => b.value - a.value || a.i - b.i);
  const say = (/** @type {{value: number, name: string}} */ one) => `${one.name} (${formatScore(one.value)})`;
  const most = others.slice(0, 2).map(say).join(", ");
  return others.length < 3 ? `Most alike: ${most}.` : `Most alike: ${most}; least: ${say(others[others.length - 1])}.`;
}

/** What is said of the shown target above the maps.
 * @param {CompareSpec} spec @param {number} chip */
export function whatOf(spec, chip) {
  return chipText(spec.chips[chip]);
}

/** @param {number | null} value */
export function formatScore(value) {
  if (value === null) return "–";
  if (Number.isInteger(value)) return `${value}`.replace("-", "−");
  const size = Math.abs(value);
  return size >= 0.001 && size < 10 ? value.toFixed(size < 0.1 ? 3 : 2).replace("-", "−") : formatNumber(value);
}
