// @ts-check
/**
 * What is read beside the picture: the legend, the patch under the pointer, the strongest patches in words; and what can
 * be pointed at: the answer's words with their probabilities, and the methods.
 * Each part builds its elements once; `update(view)` writes nothing but what changed.
 */

import { blankCanvas, contextOf, paintLegend } from "./canvas.js";
import { choices, make, section, setText } from "./dom.js";
import { clipToPicture, onPicture, patchBox, patchName } from "./grid.js";
import { formatPercent, strongest, mapText } from "./maps.js";

/**
 * @import { MapView, Part, Spec } from "./view.js"
 * @typedef {{root: HTMLElement, update: (view: MapView) => void}} MapPart
 * @typedef {{text: string, p: number | null}} Word
 */

const TOP = 5; // strongest patches listed beside the picture
const MANY = [14, 40]; // chips; beyond these the words are set smaller

/** What a reader must know of a run before anything else: what the model was trained on, and what of this question lies outside.
 * @param {{told?: string[], knows?: string}} spec @returns {Node[]} */
export function told({ told: notes = [], knows = "" }) {
  const warnings = make("ul", "lab-notes lab-told", notes.map((text) => make("li", "", [text])), { "aria-label": "To know first" });
  return [...(knows ? [make("p", "lab-knows", [knows])] : []), ...(notes.length ? [warnings] : [])];
}

/** The colour scale with real numbers, and where the patch under the pointer lies on it.
 * @param {Record<string, Uint8Array>} palettes @returns {MapPart} */
export function legend(palettes) {
  const strip = blankCanvas(256, 1);
  strip.className = "lab-strip";
  strip.setAttribute("aria-hidden", "true");
  const marker = make("span", "lab-marker", [], { "aria-hidden": "true" });
  const [low, middle, high] = ["lab-low", "lab-middle", "lab-high"].map((name) => make("span", name));
  const title = make("span", "lab-legend-title");
  const shared = make("span", "lab-legend-scale");
  const ends = make("div", "lab-ends", [low, middle, high]);
  const root = make("div", "lab-legend", [
    make("div", "lab-legend-head", [title, shared]),
    make("div", "lab-scale", [strip, marker]),
    ends,
  ]);
  let drawn = "";
  return {
    root,
    update(view) {
      const key = `${view.palette} ${view.mean} ${view.display.opacity}`;
      if (key !== drawn) paintLegend(contextOf(strip), palettes[view.palette], view.mean, view.display.opacity, 0, 0, 256, 1);
      drawn = key;
      setText(title, view.title);
      setText(shared, view.scaleSaid);
      const { shown } = view;
      [low, middle, high].forEach((node, i) => setText(node, shown ? shown.ends[i] : ""));
      root.classList.toggle("lab-empty", !shown);
      const on = shown !== null && view.focus >= 0;
      marker.hidden = !on;
      if (on && shown) marker.style.left = `${100 * shown.at(view.focus)}%`;
    },
  };
}

/** One line on the patch under the pointer or cursor: place, value, box.
 * @returns {MapPart} */
export function readout() {
  const place = make("span", "lab-place");
  const value = make("strong", "lab-value");
  const box = make("span", "lab-box");
  return {
    root: make("div", "lab-readout", [place, value, box]),
    update(view) {
      const on = view.focus >= 0;
      setText(place, on ? patchName(view.map, view.focus) : "Point at a patch; click or drag to select.");
      const text = on && view.shown ? mapText(view.shown, view.focus) : "";
      setText(value, text);
      value.classList.toggle("lab-negligible", text === "negligible");
      setText(box, on ? boxText(view) : "");
    },
  };
}

/** The strongest patches in words: the map for those who do not see it.
 * @param {(patch: number) => void} point @param {AbortSignal} signal @returns {MapPart} */
export function topList(point, signal) {
  const rows = Array.from({ length: TOP }, () => {
    const [fill, place, value] = ["lab-fill", "lab-place", "lab-value"].map((name) => make("span", name));
    const bar = make("span", "lab-bar", [fill], { "aria-hidden": "true" });
    return { root: make("li", "", [place, bar, value]), fill, place, value };
  });
  let patches = /** @type {number[]} */ ([]);
  const list = make(
    "ol",
    "lab-top",
    rows.map((row) => row.root),
  );
  list.addEventListener(
    "pointerover",
    (event) => point(patches[rows.findIndex((row) => row.root.contains(/** @type {Node} */ (event.target)))] ?? -1),
    { signal },
  );
  list.addEventListener("pointerleave", () => point(-1), { signal });
  const outside = make("p", "lab-caption");
  return {
    root: section("Strongest patches", [list, outside]),
    update(view) {
      const { shown } = view;
      const order = shown ? strongest(shown.levels, shown.levels.length) : [];
      patches = order.filter((patch) => onPicture(view.map, patch)).slice(0, TOP);
      // what lies outside the picture cannot be pointed at, but that a map is strongest there is worth knowing
      const stronger = order.indexOf(patches[0]);
      outside.hidden = !(stronger > 0);
      if (!outside.hidden) setText(outside, `Stronger still: ${stronger} ${stronger > 1 ? "patches" : "patch"} of padding.`);
      rows.forEach((row, i) => {
        row.root.hidden = i >= patches.length;
        if (row.root.hidden || !shown) return;
        const along = shown.at(patches[i]);
        setText(row.place, patchName(view.map, patches[i]));
        setText(row.value, mapText(shown, patches[i]));
        row.root.classList.toggle("lab-negligible", row.value.textContent === "negligible");
        row.fill.style.transform = `scaleX(${shown.signed ? Math.max(0, 2 * along - 1) : along})`; // costs no layout
      });
    },
  };
}

/** @param {MapView} view */
function boxText(view) {
  const [left, top, right, bottom] = clipToPicture(view.map, patchBox(view.map, view.focus)).map(Math.round);
  const picked = view.selected.has(view.focus) ? "selected · " : "";
  return `${picked}x ${left}–${right}, y ${top}–${bottom} px`;
}

/** A word with its probability as a thin bar and a number.
 * @param {Word} word @returns {Node[]} */
export function wordContent(word) {
  if (word.p === null) return [make("span", "lab-word", [word.text])];
  const fill = make("span", "lab-fill");
  fill.style.transform = `scaleX(${word.p})`;
  return [
    make("span", "lab-word", [word.text]),
    make("span", "lab-bar", [fill], { "aria-hidden": "true" }),
    make("span", "lab-percent", [formatPercent(word.p)]),
  ];
}

/** How a chip is called: its text, marked when it is no single word.
 * @param {{text: string, kind: string}} chip */
export function chipText(chip) {
  if (chip.kind === "answer") return "whole answer";
  return chip.kind === "token" ? `token ${chip.text.trim() || "␣"}` : chip.text;
}

/** The answer's words, then other targets.
 * @param {Spec} spec @param {(index: number) => void} pick @param {(index: number) => void} peek @param {AbortSignal} signal
 * @returns {Part} */
export function wordChips(spec, pick, peek, signal) {
  const items = spec.chips.map((chip) => ({
    name: [chipText(chip), chip.kind === "word" ? "" : chip.kind, chip.p === null ? "" : formatPercent(chip.p)]
      .filter((text, i, all) => text && all.indexOf(text) === i)
      .join(", "),
    content: wordContent({ text: chipText(chip), p: chip.p }),
  }));
  const group = choices({ label: "Words of the answer", className: "lab-chips", items, pick, peek, signal });
  group.root.classList.toggle("lab-many", spec.chips.length > MANY[0]);
  group.root.classList.toggle("lab-lots", spec.chips.length > MANY[1]);
  group.buttons.forEach((node, i) => node.classList.toggle("lab-other", spec.chips[i].kind !== "word"));
  if (spec.cut) group.root.append(make("span", "lab-cut", ["… cut"]));
  return { root: group.root, update: (view) => group.show(view.word, view.chip) };
}

/** @param {Spec} spec @param {(index: number) => void} pick @param {(index: number) => void} peek @param {AbortSignal} signal
 * @returns {Part} */
export function methodList(spec, pick, peek, signal) {
  const items = spec.methods.map((method) => ({
    name: method.control ? `${method.name}, control` : method.name,
    content: method.control ? [method.name, make("span", "lab-badge", ["control"])] : [method.name],
  }));
  const group = choices({ label: "Method", className: "lab-pills", items, pick, peek, signal });
  const caption = make("p", "lab-caption");
  const notes = make("ul", "lab-notes");
  let last = -1;
  return {
    root: section("Method", [group.root, caption, notes]),
    update(view) {
      group.show(view.pickedMethod, view.methodIndex);
      if (view.methodIndex === last) return;
      last = view.methodIndex;
      const { control, notes: said } = view.method;
      setText(caption, view.method.caption);
      const all = control ? ["Control: it knows nothing of the model. A map worth reading looks unlike it.", ...said] : said;
      notes.replaceChildren(...all.map((text) => make("li", "", [text])));
    },
  };
}
