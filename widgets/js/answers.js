// @ts-check
/**
 * What "ask again without these patches" brought back: the old answer beside the new one,
 * a sign of work while Python is busy, or the error in words.
 */

import { wordContent } from "./chips.js";
import { button, make } from "./dom.js";
import { formatPercent } from "./maps.js";

/**
 * @typedef {import("./view.js").Spec} Spec
 * @typedef {import("./view.js").Reply} Reply
 * @typedef {import("./chips.js").Word} Word
 */

/** The old answer beside the one without the selected patches.
 * @param {Spec} spec @param {AbortSignal} signal @returns {{root: HTMLElement, show: (reply: Reply, waited: number) => void}} */
export function answers(spec, signal) {
  const root = make("div", "lab-answers", [], { role: "group", "aria-label": "Answers before and after" });
  const old = spec.chips.filter((chip) => chip.kind === "word");
  let shown = "";
  return {
    root,
    show(reply, waited) {
      const key = JSON.stringify([reply, waited]);
      if (key === shown) return;
      shown = key;
      root.hidden = !reply.state;
      if (reply.state === "busy") root.replaceChildren(waiting(reply, waited));
      else if (reply.state === "error") root.replaceChildren(failure(reply, signal));
      else if (reply.state === "done") {
        const words = reply.words ?? [];
        const same = reply.answer === spec.answer;
        const after = `Without ${countText(reply.selected.length)}`;
        root.replaceChildren(
          column(
            "With every patch",
            old,
            spec.p,
            old.map(() => false),
            "",
          ),
          column(
            after,
            words,
            reply.p ?? null,
            newWords(
              old.map((w) => w.text),
              words.map((w) => w.text),
            ),
            same ? "same answer" : "new answer",
          ),
        );
      }
    },
  };
}

/** Which words of the new answer are not in the old one, in order (longest common subsequence).
 * @param {string[]} before @param {string[]} after */
export function newWords(before, after) {
  const long = Array.from({ length: before.length + 1 }, () => new Array(after.length + 1).fill(0));
  for (let i = before.length - 1; i >= 0; i--) {
    for (let j = after.length - 1; j >= 0; j--) {
      long[i][j] = before[i] === after[j] ? 1 + long[i + 1][j + 1] : Math.max(long[i + 1][j], long[i][j + 1]);
    }
  }
  const fresh = after.map(() => true);
  for (let i = 0, j = 0; i < before.length && j < after.length;) {
    if (before[i] === after[j]) {
      fresh[j] = false;
      i += 1;
      j += 1;
    } else if (long[i + 1][j] >= long[i][j + 1]) i += 1;
    else j += 1;
  }
  return fresh;
}

/** @param {number} count */
export function countText(count) {
  return count === 1 ? "1 patch" : `${count} patches`;
}

/** @param {string} title @param {Word[]} words @param {number | null} p @param {boolean[]} fresh @param {string} verdict */
function column(title, words, p, fresh, verdict) {
  const row = words.map((word, i) => make("span", fresh[i] ? "lab-said lab-new" : "lab-said", wordContent(word)));
  const whole = p === null ? "" : `probability of the whole answer ${formatPercent(p)}`;
  const head = make("div", "lab-column-head", [make("h3", "lab-label", [title]), make("span", "lab-verdict", [verdict])]);
  return make("div", "lab-column", [head, make("p", "lab-saying", row), make("p", "lab-caption", [whole])]);
}

/** @param {Reply} reply @param {number} waited */
function waiting(reply, waited) {
  const asked = `Asking again without ${countText(reply.selected.length)}`;
  const silent = reply.heard ? "" : " No word from Python yet; it may be busy or stopped.";
  return make("p", "lab-waiting", [
    make("span", "lab-spinner", [], { "aria-hidden": "true" }),
    waited < 2 ? `${asked}…` : `${asked}… ${waited} s.${waited < 5 ? "" : silent}`,
  ]);
}

/** @param {Reply} reply @param {AbortSignal} signal */
function failure(reply, signal) {
  const trace = make("pre", "lab-trace", [reply.trace ?? ""]);
  trace.hidden = true;
  const more = button("Show where", () => (trace.hidden = !trace.hidden), signal, "lab-link");
  return make(
    "div",
    "lab-failure",
    [make("p", "", [reply.message ?? "The callback failed."]), ...(reply.trace ? [more, trace] : [])],
    { role: "alert" },
  );
}
