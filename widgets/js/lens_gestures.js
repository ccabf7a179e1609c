// @ts-check
/**
 * Locking one patch: a press locks it or lets it go; arrows move the lock where there is one, else the cursor. The
 * pointer is followed as in every widget; only what a press means is the lens's own.
 */

import { firstOnPicture, step } from "./grid.js";
import { pointerGestures } from "./gestures.js";

/**
 * @typedef {{locked: () => number, lock: (patch: number) => void, point: (change: {hover?: number, cursor?: number}) => void,
 *   say: (patch: number) => void}} LockHost -1 is no patch
 */

/** @type {Record<string, [number, number]>} */
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** @param {HTMLElement} canvas @param {import("./grid.js").PictureMap} map @param {LockHost} host @param {AbortSignal} signal */
export function lockGestures(canvas, map, host, signal) {
  let pressed = -1;
  const follow = {
    selected: () => new Set(/** @type {number[]} */ ([])),
    select: () => host.lock(pressed === host.locked() ? -1 : pressed),
    point: (/** @type {{hover?: number, cursor?: number}} */ { hover, cursor }) => {
      if (cursor !== undefined) pressed = cursor;
      if (hover !== undefined) host.point({ hover });
    },
    say: host.say,
  };
  pointerGestures(canvas, map, follow, signal);
  let cursor = -1;
  const go = (/** @type {[number, number]} */ [down, right]) => {
    const from = host.locked() >= 0 ? host.locked() : cursor;
    cursor = from < 0 ? firstOnPicture(map) : step(map, from, down, right);
    host.point({ cursor });
    if (host.locked() >= 0) host.lock(cursor);
    host.say(cursor);
  };
  const press = (/** @type {KeyboardEvent} */ event) => {
    if (event.key in STEPS) go(STEPS[event.key]);
    else if ((event.key === " " || event.key === "Enter") && cursor >= 0) host.lock(cursor === host.locked() ? -1 : cursor);
    else return;
    event.preventDefault();
  };
  canvas.addEventListener("keydown", press, { signal });
  canvas.addEventListener("pointerdown", () => (cursor = -1), { signal });
  canvas.addEventListener("blur", () => host.point({ cursor: -1 }), { signal });
  canvas.addEventListener("focus", () => host.point({ cursor }), { signal });
}
