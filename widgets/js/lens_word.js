// @ts-check
/**
 * The word looked for: a field that knows every piece, the words the lens was asked for as buttons, and in plain words
 * how much is known of the one typed. What is typed is looked up at once; Python hears of it when it is entered.
 */

import { button, make, setText } from "./dom.js";
import { knownTexts } from "./lens_view.js";

/**
 * @typedef {{word: string, status: import("./lens_view.js").WordStatus, partly: boolean}} WordView
 */

let fields = 0; // ids of the lists of suggestions must differ within a page

/** @param {import("./lens_data.js").Lens} lens @param {(word: string) => void} type @param {(word: string) => void} enter
 * @param {AbortSignal} signal */
export function wordField(lens, type, enter, signal) {
  const id = `lab-lens-pieces-${(fields += 1)}`;
  const list = make("datalist", "", [], { id });
  const attributes = { type: "text", list: id, placeholder: "a word", autocomplete: "off", spellcheck: "false" };
  const more = { autocapitalize: "off", maxlength: "80", "aria-label": "Word to look for" };
  const input = /** @type {HTMLInputElement} */ (make("input", "lab-lens-input", [], { ...attributes, ...more }));
  input.addEventListener("input", () => type(input.value), { signal });
  input.addEventListener("change", () => enter(input.value), { signal });
  const suggest = () => list.replaceChildren(...knownTexts(lens).map((text) => make("option", "", [], { value: text })));
  input.addEventListener("focus", suggest, { signal, once: true }); // thousands at 7B size: not before they are needed
  const asked = lens.spec.words.map((word) => {
    const press = () => enter(node.getAttribute("aria-pressed") === "true" ? "" : word.trim());
    const node = button(word.trim(), press, signal, "lab-pills-item");
    return node;
  });
  const pills = make("div", "lab-pills", asked, { role: "group", "aria-label": "Words known everywhere" });
  const [status, closest] = [make("span", ""), make("span", "lab-pills lab-lens-closest")];
  const bar = make("div", "lab-lens-word", [make("span", "lab-label", ["Look for"]), input, list, pills]);
  let shown = "";
  let last = /** @type {import("./lens_view.js").WordStatus | null} */ (null);
  return {
    root: make("div", "lab-lens-find", [bar, make("p", "lab-lens-status", [status, closest], { "aria-live": "polite" })]),
    /** @param {WordView} view */
    update({ word, status: said, partly }) {
      if (word !== shown && input.value.trim() !== word) input.value = word;
      shown = word;
      if (said === last) return;
      last = said;
      for (const node of asked) markPressed(node, node.textContent === word);
      setText(status, said.text);
      status.classList.toggle("lab-lens-partly", partly);
      closest.hidden = !said.closest.length;
      const near = said.closest.map((text) => button(text, () => enter(text), signal, "lab-pills-item"));
      closest.replaceChildren(make("span", "lab-lens-soft", ["Closest known:"]), ...near);
    },
  };
}

/** @param {HTMLElement} node @param {boolean} on */
function markPressed(node, on) {
  node.setAttribute("aria-pressed", String(on));
  node.classList.toggle("lab-shown", on);
}
