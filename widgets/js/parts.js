// @ts-check
/**
 * What is read beside the picture: the legend, the patch under the pointer, the strongest patches in words.
 * Each part builds its elements once; `update(view)` writes nothing but what changed.
 */

import { blankCanvas, contextOf, paintLegend } from "./canvas.js";
import { make, section, setText } from "./dom.js";
import { clipToPicture, onPicture, patchBox, patchName } from "./grid.js";
import { formatValue, strongest } from "./maps.js";

/**
 * @typedef {import("./view.js").MapView} MapView
 * @typedef {{root: HTMLElement, update: (view: MapView) => void}} MapPart
 */

const TOP = 5; // strongest patches listed beside the picture

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
      setText(place, on ? patchName(view.map, view.focus) : "Point at a patch to read it; click or drag to select.");
      setText(value, on && view.shown ? formatValue(view.shown.value(view.focus), view.shown.fine) : "");
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
  return {
    root: section("Strongest patches", [list]),
    update(view) {
      const { shown } = view;
      patches = shown ? strongest(shown.levels, TOP) : [];
      rows.forEach((row, i) => {
        row.root.hidden = i >= patches.length;
        if (row.root.hidden || !shown) return;
        const along = shown.at(patches[i]);
        setText(row.place, patchName(view.map, patches[i]) + (onPicture(view.map, patches[i]) ? "" : " (padding)"));
        setText(row.value, formatValue(shown.value(patches[i]), shown.fine));
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
