// @ts-check
/**
 * Pointing by mouse, touch or keyboard: at patches of the picture, which can be selected, and at the spots of a plot.
 * What is pointed at goes to the host.
 */

import { changed, firstOnPicture, onPicture, patchAt, rectangle, step } from "./grid.js";

/**
 * @typedef {import("./grid.js").PictureMap} PictureMap
 * @typedef {{hover: number, cursor: number, dragging: number[]}} Pointing
 * @typedef {{selected: () => Set<number>, select: (patches: Set<number>) => void, point: (change: Partial<Pointing>) => void,
 *   say: (patch: number) => void}} Host
 */

/** @type {Record<string, [number, number]>} */
export const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** The patch under the pointer, or -1. @param {Element} canvas @param {PictureMap} map @param {MouseEvent} event */
export function patchUnder(canvas, map, event) {
  const box = canvas.getBoundingClientRect();
  const x = ((event.clientX - box.left) * map.width) / box.width;
  return patchAt(map, x, ((event.clientY - box.top) * map.height) / box.height);
}

/** Point at spots of a canvas and choose one, by pointer or by key; null is no spot.
 * @template T @param {HTMLElement} canvas @param {AbortSignal} signal
 * @param {{find: (x: number, y: number) => T | null, next: (key: string) => T | null, hover: (spot: T | null) => void,
 *   pick: (spot: T | null) => void}} host */
export function spotGestures(canvas, host, signal) {
  const at = (/** @type {MouseEvent} */ event) => {
    const box = canvas.getBoundingClientRect();
    return host.find(event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointermove", (event) => host.hover(at(event)), { signal });
  canvas.addEventListener("pointerleave", () => host.hover(null), { signal });
  canvas.addEventListener("click", (event) => host.pick(at(event)), { signal });
  const press = (/** @type {KeyboardEvent} */ event) => {
    const next = host.next(event.key);
    if (!next && event.key !== "Escape") return;
    event.preventDefault();
    host.pick(next);
  };
  canvas.addEventListener("keydown", press, { signal });
}

/** Drag a block with the pointer; a drag that starts on a selected patch takes away.
 * @param {HTMLElement} canvas @param {PictureMap} map @param {Host} host @param {AbortSignal} signal */
export function pointerGestures(canvas, map, host, signal) {
  let from = -1;
  let last = -1;
  const block = () => rectangle(map.cols, from, last).filter((patch) => onPicture(map, patch));
  const move = (/** @type {PointerEvent} */ event) => {
    const patch = patchUnder(canvas, map, event);
    if (patch >= 0) last = patch;
    host.point({ hover: patch, dragging: from < 0 ? [] : block() });
  };
  const down = (/** @type {PointerEvent} */ event) => {
    const patch = patchUnder(canvas, map, event);
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
