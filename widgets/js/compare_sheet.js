// @ts-check
/**
 * All small maps as one picture to save: in the order shown, with names and the score that orders them, on white.
 */

import { blankCanvas, contextOf, paintBase, paintGround, paintHeat, paintScene, write } from "./canvas.js";
import { formatScore, scoreOf } from "./compare_view.js";

const SHEET = { margin: 48, side: 250, gap: 20, columns: 5, under: 56, head: 190 }; // pixels

/** @param {import("./compare_view.js").CompareSpec} spec @param {import("./compare_tiles.js").TilesView} view
 * @param {Record<string, Uint8Array>} palettes @param {CanvasImageSource} picture */
export function paintSheet(spec, view, palettes, picture) {
  const { margin, side, gap, columns, under, head } = SHEET;
  const { map } = spec;
  const k = Math.min(side / map.width, side / map.height);
  const [wide, high] = [Math.round(map.width * k), Math.round(map.height * k)];
  const lines = Math.ceil(view.order.length / columns);
  const canvas = blankCanvas(2 * margin + columns * (side + gap) - gap, head + lines * (high + under) + margin);
  const ctx = contextOf(canvas);
  const room = canvas.width - 2 * margin;
  ctx.fillStyle = "#ffffff";
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  write(ctx, spec.question, margin, 74, 34, "#111827", "600", room);
  write(ctx, spec.answer, margin, 118, 28, "#374151", "400", room);
  const by = view.sort ? `, by ${view.sort}` : "";
  write(ctx, `Maps of “${view.what}”${by} · ${spec.model} · seed ${spec.seed}`, margin, 154, 20, "#6b7280", "400", room);
  const base = paintBase(map, picture, wide, high);
  const [ground, pale] = [paintGround(base), paintGround(base, 1)];
  const [inner, heat] = [blankCanvas(wide, high), blankCanvas(1, 1)];
  view.order.forEach((index, place) => {
    const { shown, palette, method, doubt } = view.tiles[index];
    const { opacity, smooth } = view.display;
    const x = margin + (place % columns) * (side + gap);
    const y = head + Math.floor(place / columns) * (high + under);
    const grey = !shown || palette.startsWith("grey");
    if (shown) paintHeat(heat, shown.levels, shown.table(palettes[palette]), map.rows, map.cols, smooth);
    const below = { base: grey ? pale : base, ground: grey ? pale : ground, heat: shown && heat };
    const look = { opacity, smooth, spotlight: false, selected: view.selected, dragging: [], hover: -1, cursor: -1 };
    paintScene(contextOf(inner), { map, ...below, ...look }, 1);
    ctx.drawImage(inner, x, y);
    const ink = doubt || !shown ? "#6b7280" : "#111827";
    const score = view.sort ? formatScore(scoreOf(spec, view.tiles[index], view.sort, view.stage)) : "";
    write(ctx, method.name, x, y + high + 24, 20, ink, "600", side - (score ? 74 : 0));
    write(ctx, score, x + wide - ctx.measureText(score).width, y + high + 24, 20, ink, "400", side);
    if (doubt) write(ctx, "not shown to beat random", x, y + high + 45, 16, ink, "400", side);
  });
  return canvas;
}
