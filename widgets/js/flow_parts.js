// @ts-check
/**
 * What stands around the two plots: flows to put on and off, the scale of the shares, the answers side by side, the line
 * that says what is pointed at. Each part builds its elements once and writes nothing but what changed.
 */

import { blankCanvas, contextOf } from "./canvas.js";
import { choices, make, setText } from "./dom.js";
import { FLOW_COLORS } from "./flow_curves.js";
import { flowText, scoreText } from "./flow_data.js";
import { shareColor } from "./flow_grid.js";

/**
 * @typedef {import("./flow_data.js").FlowSpec} FlowSpec
 * @typedef {import("./flow_data.js").GridSpec} GridSpec
 * @typedef {import("./flow_data.js").Spot} Spot
 */

/** @param {string[]} flows @param {(flow: number) => void} toggle @param {AbortSignal} signal */
export function flowToggles(flows, toggle, signal) {
  const buttons = flows.map((name, i) => {
    const swatch = make("span", "lab-flow-swatch", [], { "aria-hidden": "true" });
    swatch.style.setProperty("--lab-flow-color", FLOW_COLORS[i % FLOW_COLORS.length]);
    const node = make("button", "lab-flow-toggle", [swatch, flowText(name)], { type: "button", "aria-pressed": "true" });
    node.addEventListener("click", () => toggle(i), { signal });
    return node;
  });
  return {
    root: make("div", "lab-pills", buttons, { role: "group", "aria-label": "Flows shown" }),
    update: (/** @type {boolean[]} */ open) => buttons.forEach((node, i) => node.setAttribute("aria-pressed", String(open[i]))),
  };
}

/** One of several in a small strip; nothing where there is no choice.
 * @param {string} label @param {string[]} names @param {(index: number) => void} pick @param {AbortSignal} signal */
export function smallChoice(label, names, pick, signal) {
  const items = names.map((name) => ({ name, content: [name] }));
  const made = choices({ label, className: "lab-pair", items, pick, signal });
  made.root.hidden = names.length < 2;
  return made;
}

/** What is pointed at or chosen, in one sentence. @param {string} idle said while there is nothing */
export function spotLine(idle) {
  const root = make("p", "lab-flow-line");
  return {
    root,
    update(/** @type {string} */ text) {
      setText(root, text || idle);
      root.classList.toggle("lab-flow-idle", !text);
    },
  };
}

/** The colours with what zero and one mean.
 * @param {Uint8Array} colors */
export function shareScale(colors) {
  const strip = blankCanvas(256, 1);
  strip.className = "lab-strip";
  strip.setAttribute("aria-hidden", "true");
  const [zero, one] = [make("span", "lab-flow-tick", ["0 as corrupted"]), make("span", "lab-flow-tick", ["1 as clean"])];
  const root = make("div", "lab-flow-scale", [strip, zero, one]);
  let drawn = NaN;
  return {
    root,
    update(/** @type {number} */ least, /** @type {number} */ reach) {
      const key = least * 100 + reach;
      if (key === drawn) return;
      drawn = key;
      const lo = Math.min(0, least);
      const hi = Math.max(1, reach);
      const ctx = contextOf(strip);
      for (let i = 0; i < 256; i++) {
        ctx.fillStyle = `rgb(${shareColor(colors, lo + (i / 255) * (hi - lo), reach).join(", ")})`;
        ctx.fillRect(i, 0, 1, 1);
      }
      [zero, one].forEach((node, value) => (node.style.left = `${(100 * (value - lo)) / (hi - lo)}%`));
      one.classList.toggle("lab-flow-last", hi < 1.2);
      zero.classList.toggle("lab-flow-first", lo > -0.15 * hi);
    },
  };
}

/** The answer of the chosen cell between those of the two runs.
 * @param {GridSpec} grid */
export function answerCards(grid) {
  const given = [["clean run", grid.clean], ["this cell", ""], [`corrupted (${grid.corruption})`, grid.corrupt]];
  const cards = given.map(([name, said]) => {
    const strong = make("strong", "", [said]);
    const caption = make("span", "lab-caption", [name]);
    return { root: make("div", "lab-flow-answer", [caption, strong]), strong, caption };
  });
  cards[1].root.classList.add("lab-flow-now");
  const root = make("div", "lab-flow-answers", cards.map((card) => card.root), { role: "group", "aria-label": "Answers" });
  return {
    root,
    update(/** @type {number} */ component, /** @type {Spot | null} */ spot, /** @type {number} */ share) {
      const measured = spot !== null && grid.answers[component][spot[0]][spot[1]] !== "";
      setText(cards[1].strong, spot === null ? "–" : measured ? grid.answers[component][spot[0]][spot[1]] : "not measured");
      const back = Number.isFinite(share) ? ` · ${scoreText(share)} back` : "";
      setText(cards[1].caption, spot === null ? "click a cell" : `this cell${back}`);
    },
  };
}
