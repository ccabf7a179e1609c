// @ts-check
/**
 * The patch grid on the original picture, and sets of patches. The affine map is Python's PictureMap:
 * model = picture * scale + offset, in pixels. Patches are flat indices, row-major. Knows no page.
 */

/**
 * @typedef {{width: number, height: number, size: number, rows: number, cols: number, mode: string,
 *   scale_x: number, scale_y: number, offset_x: number, offset_y: number}} PictureMap
 * @typedef {[number, number, number, number]} Box left, top, right, bottom in picture pixels
 */

/** The model's square input, in picture pixels; it may reach outside the picture (pad) or lie inside (crop).
 * @param {PictureMap} map @returns {Box} */
export function modelSquare(map) {
  const left = -map.offset_x / map.scale_x;
  const top = -map.offset_y / map.scale_y;
  return [left, top, left + map.size / map.scale_x, top + map.size / map.scale_y];
}

/** @param {PictureMap} map @param {number} patch @returns {Box} */
export function patchBox(map, patch) {
  const [left, top, right, bottom] = modelSquare(map);
  const row = Math.floor(patch / map.cols);
  const col = patch % map.cols;
  const w = (right - left) / map.cols;
  const h = (bottom - top) / map.rows;
  return [left + col * w, top + row * h, left + (col + 1) * w, top + (row + 1) * h];
}

/** @param {PictureMap} map @param {Box} box @returns {Box} the part of a box that lies on the picture */
export function clipToPicture(map, box) {
  return [Math.max(0, box[0]), Math.max(0, box[1]), Math.min(map.width, box[2]), Math.min(map.height, box[3])];
}

/** Does any of a patch lie on the picture? False for pure padding.
 * @param {PictureMap} map @param {number} patch */
export function onPicture(map, patch) {
  const [left, top, right, bottom] = clipToPicture(map, patchBox(map, patch));
  return right - left > 1e-6 && bottom - top > 1e-6;
}

/** The patch that sees picture point (x, y), or -1 where the model never looked.
 * @param {PictureMap} map @param {number} x @param {number} y */
export function patchAt(map, x, y) {
  const mx = x * map.scale_x + map.offset_x;
  const my = y * map.scale_y + map.offset_y;
  if (mx < 0 || my < 0 || mx >= map.size || my >= map.size) return -1;
  if (x < 0 || y < 0 || x >= map.width || y >= map.height) return -1;
  return Math.floor((my * map.rows) / map.size) * map.cols + Math.floor((mx * map.cols) / map.size);
}

/** One step from a patch, held at the grid's edge and on the picture.
 * @param {PictureMap} map @param {number} patch @param {number} down @param {number} right */
export function step(map, patch, down, right) {
  const row = Math.min(map.rows - 1, Math.max(0, Math.floor(patch / map.cols) + down));
  const col = Math.min(map.cols - 1, Math.max(0, (patch % map.cols) + right));
  const next = row * map.cols + col;
  return onPicture(map, next) ? next : patch;
}

/** The first patch that lies on the picture.
 * @param {PictureMap} map */
export function firstOnPicture(map) {
  for (let patch = 0; patch < map.rows * map.cols; patch++) if (onPicture(map, patch)) return patch;
  return 0;
}

/** All patches of the rectangle between two patches, both included.
 * @param {number} cols @param {number} from @param {number} to */
export function rectangle(cols, from, to) {
  const rows = [Math.floor(from / cols), Math.floor(to / cols)].sort((a, b) => a - b);
  const columns = [from % cols, to % cols].sort((a, b) => a - b);
  const patches = [];
  for (let row = rows[0]; row <= rows[1]; row++) {
    for (let col = columns[0]; col <= columns[1]; col++) patches.push(row * cols + col);
  }
  return patches;
}

/** A new set with the patches added or taken away.
 * @param {Set<number>} selected @param {number[]} patches @param {boolean} add */
export function changed(selected, patches, add) {
  const next = new Set(selected);
  for (const patch of patches) {
    if (add) next.add(patch);
    else next.delete(patch);
  }
  return next;
}

/** @param {Set<number>} selected */
export function sorted(selected) {
  return [...selected].sort((a, b) => a - b);
}

/** The sides of selected patches that face an unselected one: the outline of the selection, as boxes of no width.
 * @param {PictureMap} map @param {Set<number>} selected @returns {Box[]} */
export function outline(map, selected) {
  /** @type {Box[]} */
  const lines = [];
  for (const patch of selected) {
    const row = Math.floor(patch / map.cols);
    const col = patch % map.cols;
    const [left, top, right, bottom] = clipToPicture(map, patchBox(map, patch));
    if (row === 0 || !selected.has(patch - map.cols)) lines.push([left, top, right, top]);
    if (row === map.rows - 1 || !selected.has(patch + map.cols)) lines.push([left, bottom, right, bottom]);
    if (col === 0 || !selected.has(patch - 1)) lines.push([left, top, left, bottom]);
    if (col === map.cols - 1 || !selected.has(patch + 1)) lines.push([right, top, right, bottom]);
  }
  return lines;
}

/** "row 3, column 5", from zero as in Python, so that what is read here can be typed there.
 * @param {PictureMap} map @param {number} patch */
export function patchName(map, patch) {
  return `row ${Math.floor(patch / map.cols)}, column ${patch % map.cols}`;
}
