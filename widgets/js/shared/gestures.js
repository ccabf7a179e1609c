// @ts-check
/**
 * Pointing and selecting on the picture by mouse, touch or keyboard. Knows the grid and one element;
 * what it finds goes to its host.
 */

import { changed, firstOnPicture, onPicture, patchAt, rectangle, step } from "./grid.js";

/**
 * @typedef {import("./grid.js").PictureMap} PictureMap
 * @typedef {{hover: number, cursor: number, dragging: number[]}} Pointing
 * @typedef {{selected: () => Set<number>, select: (patches: Set<number>) => void, point: (change: Partial<Pointing>) => void,
 *   say: (patch: number) => void}} Host
 */

/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** Drag a block with the pointer; a drag that starts on a selected patch takes away.
 * @param {HTMLElement} canvas @param {PictureMap} map @param {Host} host @param {AbortSignal} signal */
export function pointerGestures(canvas, map, host, signal) {
  let from = -1;
  let last = -1;
  const at = (/** @type {PointerEvent} */ event) => {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * map.width) / box.width;
    return patchAt(map, x, ((event.clientY - box.top) * map.height) / box.height);
  };
  const block = () => rectangle(map.cols, from, last).filter((patch) => onPicture(map, patch));
  const move = (/** @type {PointerEvent} */ event) => {
    const patch = at(event);
    if (patch >= 0) last = patch;
    host.point({ hover: patch, dragging: from < 0 ? [] : block() });
  };
  const down = (/** @type {PointerEvent} */ event) => {
    const patch = at(event);
    if (event.button !== 0 || patch < 0) return;
    from = last = patch;
    canvas.setPointerCapture(event.pointerId);
    host.point({ cursor: patch, dragging: [patch] });
  };
  const up = () => {
    if (from >= 0) host.select(changed(host.selected(), block(), !host.selected().has(from)));
    cancel();
  };
  const cancel = () => {
    from = -1;
    host.point({ dragging: [] });
  };
  canvas.addEventListener("pointermove", move, { signal });
  canvas.addEventListener("pointerdown", down, { signal });
  canvas.addEventListener("pointerup", up, { signal });
  canvas.addEventListener("pointercancel", cancel, { signal });
  canvas.addEventListener("pointerleave", () => host.point({ hover: -1 }), { signal });
}

/** Arrows move, space toggles, shift with arrows selects a block, escape clears.
 * @param {HTMLElement} canvas @param {PictureMap} map @param {Host} host @param {AbortSignal} signal */
export function keyboardGestures(canvas, map, host, signal) {
  let cursor = -1;
  let anchor = -1;
  const go = (/** @type {[number, number]} */ [down, right], /** @type {boolean} */ extend) => {
    if (extend && anchor < 0) anchor = Math.max(cursor, firstOnPicture(map));
    if (!extend) anchor = -1;
    cursor = cursor < 0 ? firstOnPicture(map) : step(map, cursor, down, right);
    host.point({ cursor });
    if (extend) host.select(changed(host.selected(), rectangle(map.cols, anchor, cursor), true));
    host.say(cursor);
  };
  const toggle = () => {
    if (cursor < 0) return;
    host.select(changed(host.selected(), [cursor], !host.selected().has(cursor)));
    host.say(cursor);
  };
  const press = (/** @type {KeyboardEvent} */ event) => {
    if (event.key in ARROWS) go(ARROWS[event.key], event.shiftKey);
    else if (event.key === " " || event.key === "Enter") toggle();
    else if (event.key === "Escape") host.select(new Set());
    else return;
    event.preventDefault();
  };
  canvas.addEventListener("keydown", press, { signal });
  canvas.addEventListener("pointerdown", () => (cursor = -1), { signal });
  canvas.addEventListener("blur", () => host.point({ cursor: -1 }), { signal });
  canvas.addEventListener("focus", () => host.point({ cursor }), { signal });
}
