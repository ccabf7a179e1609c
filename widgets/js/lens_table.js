// @ts-check
/**
 * The top words, a row per state: of the patch in question, or of all patches where there is none. Bars are
 * probabilities (or shares of patches). A row can be pointed at and chosen. Builds its cells once.
 */

import { make, setText } from "./dom.js";
import { chanceText } from "./lens_data.js";
import { stateName } from "./lens_view.js";

/**
 * @typedef {{piece: number, value: number}} Said
 * @typedef {{key: string, tableTitle: string, tableCaption: string, rows: () => Said[][],
 *   entropy: (state: number) => string, state: number, kept: number, hits: Set<number>}} TableView
 * @typedef {{root: HTMLElement, text: HTMLElement, share: HTMLElement, fill: HTMLElement, hit: boolean}} Cell
 */

const MOST_COLUMNS = 6;

/** @param {import("./lens_data.js").Lens} lens @param {(index: number) => void} pick @param {(index: number) => void} peek
 * @param {AbortSignal} signal */
export function lensTable(lens, pick, peek, signal) {
  const columns = Math.min(lens.top, MOST_COLUMNS);
  const rows = lens.spec.states.map((state, index) => tableRow(state, columns, () => pick(index), signal));
  const names = ["state", ...Array.from({ length: columns }, (_, i) => (i ? `${i + 1}` : "likeliest")), "entropy"];
  const heads = names.map((name) => make("span", "", [name], { role: "columnheader" }));
  const header = make("div", "lab-lens-row lab-lens-header", heads, { role: "row" });
  const table = make("div", "lab-lens-table", [header, ...rows.map(({ root }) => root)], { role: "table" });
  table.style.setProperty("--lab-columns", `${columns}`);
  table.classList.toggle("lab-lens-dense", rows.length > 14);
  const indexOf = (/** @type {Event} */ event) => rows.findIndex(({ root }) => root.contains(/** @type {Node} */ (event.target)));
  table.addEventListener("click", (event) => indexOf(event) >= 0 && pick(indexOf(event)), { signal });
  table.addEventListener("pointerover", (event) => peek(indexOf(event)), { signal });
  table.addEventListener("pointerleave", () => peek(-1), { signal });
  const [title, caption] = [make("h3", "lab-lens-title"), make("p", "lab-caption")];
  let last = "";
  let marked = [-1, -1];
  return {
    root: make("section", "lab-section", [title, table, caption]),
    /** @param {TableView} view */
    update(view) {
      setText(title, view.tableTitle);
      setText(caption, view.tableCaption);
      table.setAttribute("aria-label", view.tableTitle);
      for (const index of new Set([...marked, view.state, view.kept])) {
        if (rows[index]) markRow(rows[index], index === view.state, index === view.kept);
      }
      marked = [view.state, view.kept];
      if (view.key === last) return;
      last = view.key;
      view.rows().forEach((said, index) => fillRow(lens, rows[index], said, view, index));
    },
  };
}

/** @param {number} state @param {number} columns @param {() => void} press @param {AbortSignal} signal */
function tableRow(state, columns, press, signal) {
  const attributes = { type: "button", "aria-label": `state ${state}, ${stateName(state)}` };
  const name = make("button", "lab-lens-state", [`${state}`], attributes);
  name.addEventListener("click", (event) => (event.stopPropagation(), press()), { signal });
  const cells = Array.from({ length: columns }, tableCell);
  const entropy = make("span", "lab-lens-entropy", [], { role: "cell" });
  const all = [make("span", "", [name], { role: "rowheader" }), ...cells.map(({ root }) => root), entropy];
  return { root: make("div", "lab-lens-row", all, { role: "row" }), name, cells, entropy };
}

/** @returns {Cell} */
function tableCell() {
  const [fill, text, share] = ["lab-lens-fill", "lab-lens-text", "lab-lens-share"].map((kind) => make("span", kind));
  fill.setAttribute("aria-hidden", "true");
  return { root: make("span", "lab-lens-cell", [fill, text, share], { role: "cell" }), text, share, fill, hit: false };
}

/** @param {ReturnType<typeof tableRow>} row @param {boolean} shown @param {boolean} kept */
function markRow({ root, name }, shown, kept) {
  root.classList.toggle("lab-shown", shown);
  root.classList.toggle("lab-lens-kept", kept);
  name.setAttribute("aria-pressed", String(kept));
}

/** @param {import("./lens_data.js").Lens} lens @param {ReturnType<typeof tableRow>} row @param {Said[]} said
 * @param {TableView} view @param {number} index */
function fillRow(lens, row, said, view, index) {
  row.cells.forEach((cell, i) => {
    const one = said[i];
    setText(cell.text, one ? lens.texts[one.piece] : "");
    setText(cell.share, one ? chanceText(one.value) : "");
    cell.fill.style.transform = `scaleX(${one ? one.value : 0})`; // costs no layout
    const hit = Boolean(one) && view.hits.has(one.piece);
    if (hit !== cell.hit) cell.root.classList.toggle("lab-lens-hit", hit);
    cell.hit = hit;
  });
  setText(row.entropy, view.entropy(index));
}
