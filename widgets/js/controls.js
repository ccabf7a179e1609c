// @ts-check
/**
 * How the map is looked at, and what is done with the selection. Each control calls back; none keeps state.
 */

import { countText } from "./answers.js";
import { button, choices, make, section, setText, slider } from "./dom.js";

/**
 * @typedef {import("./view.js").View} View
 * @typedef {import("./view.js").Part} Part
 * @typedef {import("./view.js").Spec} Spec
 * @typedef {import("./view.js").Display} Display
 * @typedef {{strongest: () => void, random: () => void, clear: () => void, ask: () => void}} SelectionActions
 */

/** Opacity, patches or smooth, colours or the picture itself lit up, one scale or each map its own.
 * @param {Display} start @param {(change: Partial<Display>) => void} change @param {AbortSignal} signal @returns {Part} */
export function displayControls(start, change, signal) {
  const pair = (/** @type {string} */ label, /** @type {string[]} */ names, /** @type {(second: boolean) => void} */ pick) => {
    const items = names.map((name) => ({ name, content: [name] }));
    const group = choices({ label, className: "lab-pair", items, pick: (index) => pick(index === 1), signal });
    return { root: make("div", "lab-slider", [make("span", "lab-label", [label]), group.root]), show: group.show };
  };
  const value = Math.round(100 * start.opacity);
  const input = (/** @type {number} */ percent) => change({ opacity: percent / 100 });
  const opacity = slider({ label: "Opacity", min: 0, max: 100, step: 5, value, input, signal });
  const look = pair("Look", ["Patches", "Smooth"], (smooth) => change({ smooth }));
  const scale = pair("Scale", ["All words", "This map"], (ownScale) => change({ ownScale }));
  const paint = pair("Paint", ["Colour", "Spotlight"], (spotlight) => change({ spotlight }));
  return {
    root: section("Display", [opacity.root, look.root, paint.root, scale.root]),
    update({ display }) {
      setText(opacity.output, `${Math.round(100 * display.opacity)}%`);
      look.show(Number(display.smooth), -1);
      scale.show(Number(display.ownScale), -1);
      paint.show(Number(display.spotlight), -1);
    },
  };
}

/** A slider over the layers of the method shown; absent where it has one map only.
 * @param {Spec} spec @param {(layer: number) => void} pick @param {AbortSignal} signal @returns {Part} */
export function layerControl(spec, pick, signal) {
  const { root: row, range, output } = slider({ label: "Layer", min: 0, max: 0, step: 1, value: 0, input: pick, signal });
  return {
    root: row,
    update({ method, layer }) {
      row.hidden = method.layers.length < 2;
      const last = String(method.layers.length - 1);
      if (range.max !== last) range.max = last;
      if (range.value !== String(layer)) range.value = String(layer);
      range.setAttribute("aria-valuetext", method.layers[layer]);
      setText(output, method.layers[layer]);
    },
  };
}

/** How many patches are selected, quick selections, and the question asked again.
 * @param {boolean} canAsk @param {number} quick @param {SelectionActions} act @param {AbortSignal} signal @returns {Part} */
export function selectionBar(canAsk, quick, act, signal) {
  const count = make("span", "lab-count");
  const clear = button("Clear", act.clear, signal);
  const ask = button("Ask again without these patches", act.ask, signal, "lab-button lab-primary");
  ask.hidden = !canAsk;
  const strongest = button(`Strongest ${quick}`, act.strongest, signal);
  const random = button(`Random ${quick}`, act.random, signal);
  random.title = "A control: as many patches, chosen without looking at any map";
  const tools = make("div", "lab-tools", [strongest, random, clear]);
  const root = make("div", "lab-selection", [count, tools, ask], { role: "group", "aria-label": "Selected patches" });
  return {
    root,
    update({ selected, map, busy, shown }) {
      setText(count, selected.size ? `${countText(selected.size)} of ${map.rows * map.cols} selected` : "No patches selected");
      strongest.disabled = !shown;
      clear.disabled = !selected.size;
      ask.disabled = !selected.size || busy;
      setText(ask, busy ? "Asking…" : "Ask again without these patches");
    },
  };
}
