// @ts-check
/**
 * The projected token itself, before any layer: the words it points nearest to, and how long it is beside the others.
 */

import { make, setText } from "./dom.js";
import { chanceText, commonestNear, nearPieces } from "./lens_data.js";

/**
 * @typedef {import("./lens_data.js").Lens} Lens
 */

/** @param {Lens} lens */
export function nearList(lens) {
  const about = lens.spec.near;
  if (!about) return null;
  const space = about.space === "output" ? "output head" : "input embeddings";
  const lines = Array.from({ length: about.top }, nearLine);
  const [title, norm, caption] = [make("h3", "lab-lens-title"), make("p", "lab-lens-norm"), make("p", "lab-caption")];
  setText(caption, `Cosines with the ${space}${about.centered ? ", each less the mean of its kind" : ", as they are"}.`);
  const sorted = lens.norms.slice().sort();
  const everywhere = commonestNear(lens);
  let last = -2;
  return {
    root: make("section", "lab-section", [title, make("ul", "lab-lens-near", lines.map(({ root }) => root)), norm, caption]),
    /** @param {{patch: number}} view */
    update({ patch }) {
      if (patch === last) return;
      last = patch;
      setText(title, patch < 0 ? "Nearest words, by share of patches" : "Nearest words of the projected token");
      const said = patch < 0 ? everywhere : nearPieces(lens, patch);
      lines.forEach(({ root, text, value, fill }, i) => {
        root.classList.toggle("lab-empty", !said[i]);
        setText(text, said[i] ? lens.texts[said[i].piece] : "–");
        setText(value, said[i] ? (patch < 0 ? chanceText(said[i].value) : said[i].value.toFixed(2).replace("-", "−")) : "");
        fill.style.transform = `scaleX(${said[i] ? Math.max(0, said[i].value) : 0})`;
      });
      setText(norm, normText(lens.norms, sorted, patch));
    },
  };
}

/** How long a token is beside those of all patches.
 * @param {Float32Array} norms @param {Float32Array} sorted @param {number} patch */
export function normText(norms, sorted, patch) {
  const say = (/** @type {number} */ value) => String(Number(value.toPrecision(3)));
  const middle = say(sorted[Math.floor(sorted.length / 2)]);
  if (patch < 0) return `Norms ${say(sorted[0])} to ${say(sorted[sorted.length - 1])}, median ${middle}`;
  const longer = norms.reduce((count, one) => count + Number(one > norms[patch]), 0);
  return `Norm ${say(norms[patch])}, rank ${longer + 1} of ${norms.length}; median ${middle}`;
}

function nearLine() {
  const [text, fill, value] = ["lab-lens-text", "lab-fill", "lab-value"].map((kind) => make("span", kind));
  const bar = make("span", "lab-bar", [fill], { "aria-hidden": "true" });
  return { root: make("li", "lab-lens-near-line", [text, bar, value]), text, value, fill };
}
