// @ts-check
/**
 * What can be pointed at: the answer's words with their probabilities, and the methods.
 */

import { choices, make, section, setText } from "./dom.js";
import { formatPercent } from "./maps.js";

/**
 * @typedef {import("./view.js").Spec} Spec
 * @typedef {import("./view.js").Part} Part
 * @typedef {{text: string, p: number | null}} Word
 */

const MANY = [14, 40]; // chips; beyond these the words are set smaller

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
