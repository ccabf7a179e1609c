// @ts-check
/**
 * Small pieces of page: elements, groups of choices, sliders. Text enters as text only, every control
 * has a name and works from the keyboard. Listeners end with the signal they are given.
 */

/**
 * @typedef {{label: string, className: string, items: {name: string, content: (Node | string)[]}[],
 *   pick: (index: number) => void, peek?: (index: number) => void, signal: AbortSignal}} ChoiceOptions
 * @typedef {{root: HTMLElement, buttons: HTMLElement[], show: (picked: number, shown: number) => void}} Choices
 * @typedef {{label: string, min: number, max: number, step: number, value: number,
 *   input: (value: number) => void, signal: AbortSignal}} SliderOptions
 */

/** @param {string} tag @param {string} className @param {(Node | string)[]} [children]
 * @param {Record<string, string>} [attributes] */
export function make(tag, className, children = [], attributes = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // strings become text nodes: markup in an answer stays text
  return node;
}

/** @param {string} text @param {() => void} press @param {AbortSignal} signal @param {string} [className] */
export function button(text, press, signal, className = "lab-button") {
  const node = /** @type {HTMLButtonElement} */ (make("button", className, [text], { type: "button" }));
  node.addEventListener("click", press, { signal });
  return node;
}

/** Set text only when it differs, so that an unchanged line costs no layout.
 * @param {Node} node @param {string} text */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Call when an element changes its size, until the signal. @param {Element} node @param {() => void} call
 * @param {AbortSignal} signal */
export function whenResized(node, call, signal) {
  const watch = new ResizeObserver(call);
  watch.observe(node);
  signal.addEventListener("abort", () => watch.disconnect());
}

/** A whole widget: one card with a name. @param {string} kind its classes @param {string} label @param {Node[]} parts
 * @param {string} [own] the card's classes */
export function carded(kind, label, parts, own = "lab-card") {
  return make("div", kind, [make("div", own, parts, { role: "group", "aria-label": label })]);
}

/** @param {string} title @param {Node[]} children */
export function section(title, children) {
  return make("section", "lab-section", [make("h3", "lab-label", [title]), ...children]);
}

/** One of several: a radio group with one tab stop; arrows, Home and End move; hovering peeks.
 * @param {ChoiceOptions} options @returns {Choices} */
export function choices({ label, className, items, pick, peek, signal }) {
  const root = make("div", className, [], { role: "radiogroup", "aria-label": label });
  const buttons = items.map((item) =>
    make("button", `${className}-item`, item.content, { type: "button", role: "radio", "aria-label": item.name }),
  );
  root.append(...buttons);
  const indexOf = (/** @type {Event} */ event) =>
    buttons.findIndex((node) => event.target instanceof Node && node.contains(event.target));
  const choose = (/** @type {number} */ index) => {
    if (index < 0) return;
    pick(index);
    buttons[index].focus();
  };
  root.addEventListener("click", (event) => choose(indexOf(event)), { signal });
  root.addEventListener("keydown", (event) => choose(nextChoice(event.key, indexOf(event), buttons.length)), { signal });
  if (peek) {
    root.addEventListener("pointerover", (event) => peek(indexOf(event)), { signal });
    root.addEventListener("pointerleave", () => peek(-1), { signal });
  }
  return { root, buttons, show: showChoice(buttons) };
}

/** Where a key leads in a group of choices, or -1.
 * @param {string} key @param {number} index @param {number} count */
export function nextChoice(key, index, count) {
  if (index < 0) return -1;
  if (key === "ArrowRight" || key === "ArrowDown") return (index + 1) % count;
  if (key === "ArrowLeft" || key === "ArrowUp") return (index + count - 1) % count;
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  return -1;
}

/** @param {SliderOptions} options */
export function slider({ label, min, max, step, value, input, signal }) {
  const range = /** @type {HTMLInputElement} */ (
    make("input", "lab-range", [], { type: "range", min: `${min}`, max: `${max}`, step: `${step}`, "aria-label": label })
  );
  range.value = `${value}`;
  range.addEventListener("input", () => input(Number(range.value)), { signal });
  const output = make("span", "lab-slider-value");
  const root = make("div", "lab-slider", [make("span", "lab-label", [label]), range, output]);
  return { root, range, output };
}

/** @param {HTMLElement[]} buttons */
function showChoice(buttons) {
  let last = [-1, -1];
  for (const node of buttons) mark(node, false, false);
  return (/** @type {number} */ picked, /** @type {number} */ shown) => {
    for (const index of new Set([...last, picked, shown])) {
      if (buttons[index]) mark(buttons[index], index === picked, index === shown);
    }
    last = [picked, shown];
  };
}

/** @param {HTMLElement} node @param {boolean} picked @param {boolean} shown */
function mark(node, picked, shown) {
  node.setAttribute("aria-checked", String(picked));
  node.tabIndex = picked ? 0 : -1;
  node.classList.toggle("lab-shown", shown);
}

/** One of a few, side by side. @param {string} label @param {string[]} names @param {(index: number) => void} pick
 * @param {AbortSignal} signal */
export function segmented(label, names, pick, signal) {
  return choices({ label, className: "lab-pair", items: names.map((name) => ({ name, content: [name] })), pick, signal });
}

/** How strongly maps lie on the picture. @param {{opacity: number}} display @param {(change: any) => void} change
 * @param {AbortSignal} signal */
export function opacitySlider(display, change, signal) {
  const input = (/** @type {number} */ percent) => change({ opacity: percent / 100 });
  const value = Math.round(100 * display.opacity);
  const { root, output } = slider({ label: "Opacity", min: 0, max: 100, step: 5, value, input, signal });
  return { root, show: (/** @type {number} */ opacity) => setText(output, `${Math.round(100 * opacity)}%`) };
}
