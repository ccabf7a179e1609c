// @ts-check
/**
 * Two lists beside the matrix: the heads that look most, and how much each word looks, over all heads. They say in
 * words what the colours say, and each line can be pointed at and chosen.
 */

import { make, setText } from "./dom.js";
import { headName, shareText, wordName } from "./heads_view.js";

/**
 * @typedef {import("./heads_view.js").At} At
 * @typedef {import("./heads_view.js").HeadsSpec} HeadsSpec
 * @typedef {{best: (At & {value: number})[], words: {share: number, best: At & {value: number}}[], chip: number, on: string,
 *   what: string}} ListsView
 */

/** The strongest heads for the word shown. Pointing at one shows its map, choosing keeps it.
 * @param {number} count @param {(at: At | null) => void} hover @param {(at: At) => void} pick @param {AbortSignal} signal */
export function headList(count, hover, pick, signal) {
  let best = /** @type {(At & {value: number})[]} */ ([]);
  const lines = Array.from({ length: count }, (_, i) => {
    const part = line(signal, () => pick(best[i]));
    part.root.addEventListener("pointerenter", () => hover(best[i]), { signal });
    part.root.addEventListener("pointerleave", () => hover(null), { signal });
    return part;
  });
  const label = make("h3", "lab-label");
  return {
    root: make("section", "lab-section", [label, make("ul", "lab-lines", lines.map(({ root }) => make("li", "", [root])))]),
    /** @param {ListsView} view */
    update(view) {
      best = view.best;
      setText(label, `Heads of “${view.what}” that look most at ${view.on}`);
      const most = best[0]?.value ?? 0;
      lines.forEach(({ root, name, value, fill }, i) => {
        root.hidden = i >= best.length;
        if (root.hidden) return;
        setText(name, headName(best[i]));
        setText(value, shareText(best[i].value));
        fill.style.transform = `scaleX(${most > 0 ? best[i].value / most : 0})`;
      });
    },
  };
}

/** Each word's attention on what is pointed at or selected, over all heads. Pointing at one shows it, choosing keeps it.
 * @param {HeadsSpec} spec @param {(word: number) => void} peek @param {(word: number) => void} pick
 * @param {AbortSignal} signal */
export function wordList(spec, peek, pick, signal) {
  const lines = spec.chips.map((_, i) => {
    const part = line(signal, () => pick(i));
    setText(part.name, wordName(spec, i));
    part.root.addEventListener("pointerenter", () => peek(i), { signal });
    part.root.addEventListener("pointerleave", () => peek(-1), { signal });
    return part;
  });
  const label = make("h3", "lab-label");
  const list = make("ul", "lab-lines", lines.map(({ root }) => make("li", "", [root])));
  return {
    root: make("section", "lab-section", [label, list]),
    /** @param {ListsView} view */
    update(view) {
      setText(label, `Words that look at ${view.on}, mean over all heads`);
      const most = Math.max(...view.words.map(({ share }) => share), 0);
      lines.forEach(({ root, value, fill, more }, i) => {
        const { share, best } = view.words[i];
        setText(value, shareText(share));
        setText(more, `most: ${headName(best)}, ${shareText(best.value)}`);
        fill.style.transform = `scaleX(${most > 0 ? share / most : 0})`;
        root.classList.toggle("lab-shown", i === view.chip);
      });
    },
  };
}

/** @param {AbortSignal} signal @param {() => void} press */
function line(signal, press) {
  const [name, value, more, fill] = ["lab-line-name", "lab-value", "lab-line-more", "lab-fill"].map((kind) => make("span", kind));
  const bar = make("span", "lab-bar", [fill], { "aria-hidden": "true" });
  const root = make("button", "lab-line", [name, bar, value, more], { type: "button" });
  root.addEventListener("click", press, { signal });
  return { root, name, value, more, fill };
}
