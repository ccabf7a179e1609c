// @ts-check
/**
 * The drawn world: things on pale paper, as Python draws them. A thing's shape comes as four shares a pixel (its colour, its dark
 * edge, ink, white), so that every colour is mixed here; where things may stand are the rules the model was trained under.
 * Knows no page.
 */

/**
 * @typedef {{kind: string, color: string, size: string, x: number, y: number, mirrored: boolean}} Thing centre in pixels of the paper
 * @typedef {{side: number, gap: number, most: number, margin: number, kinds: string[], sizes: Record<string, number>, fine: number,
 *   parts: number, colors: Record<string, number[]>, dark: number, ink: number[], white: number[], papers: number[][],
 *   first: {things: Thing[], paper: number}}} World
 */

const PARTS = 4; // numbers a pixel

export class Drawing {
  /** @param {World} world @param {Uint8Array} shares of every kind, at each size and then fine, one after the other */
  constructor(world, shares) {
    this.world = world;
    this.shapes = /** @type {Map<string, Uint8Array>} */ (new Map());
    const sides = { ...world.sizes, fine: world.fine };
    let at = 0;
    for (const kind of world.kinds) {
      for (const [size, side] of Object.entries(sides)) {
        this.shapes.set(`${kind} ${size}`, shares.subarray(at, (at += PARTS * side * side)));
      }
    }
  }

  /** A thing on a clear ground: its side and RGBA. @param {string} kind @param {string} color @param {string} size or "fine"
   * @param {boolean} mirrored */
  sprite(kind, color, size, mirrored) {
    const { world } = this;
    const side = size === "fine" ? world.fine : world.sizes[size];
    const shares = /** @type {Uint8Array} */ (this.shapes.get(`${kind} ${size}`));
    const main = world.colors[color];
    const inks = [main, main.map((value) => Math.round(value * world.dark)), world.ink, world.white];
    const out = new Uint8ClampedArray(4 * side * side);
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        const from = PARTS * (y * side + (mirrored ? side - 1 - x : x));
        const to = 4 * (y * side + x);
        let whole = 0;
        for (let part = 0; part < PARTS; part++) whole += shares[from + part];
        if (!whole) continue;
        for (let c = 0; c < 3; c++) {
          let sum = 0;
          for (let part = 0; part < PARTS; part++) sum += shares[from + part] * inks[part][c];
          out[to + c] = Math.round(sum / whole);
        }
        out[to + 3] = Math.round((255 * whole) / world.parts);
      }
    }
    return { side, data: out };
  }

  /** The picture the model is shown. @param {Thing[]} things @param {number} paper @returns {import("./pixels.js").Rgb} */
  picture(things, paper) {
    const { side } = this.world;
    const data = new Uint8Array(3 * side * side);
    for (let i = 0; i < data.length; i++) data[i] = this.world.papers[paper][i % 3];
    for (const thing of things) {
      const drawn = this.sprite(thing.kind, thing.color, thing.size, thing.mirrored);
      const [left, top] = corner(this.world, thing);
      for (let y = 0; y < drawn.side; y++) {
        for (let x = 0; x < drawn.side; x++) {
          const from = 4 * (y * drawn.side + x);
          const alpha = drawn.data[from + 3];
          if (!alpha || left + x >= side || top + y >= side) continue;
          const to = 3 * ((top + y) * side + left + x);
          for (let c = 0; c < 3; c++) data[to + c] = Math.round((drawn.data[from + c] * alpha + data[to + c] * (255 - alpha)) / 255);
        }
      }
    }
    return { data, width: side, height: side };
  }
}

/** Upper left corner in whole pixels. @param {World} world @param {Thing} thing @returns {[number, number]} */
export function corner(world, thing) {
  const half = world.sizes[thing.size] / 2;
  return [Math.max(0, Math.round(thing.x - half)), Math.max(0, Math.round(thing.y - half))];
}

/** Does a thing lie on the paper, clear of all others? @param {World} world @param {Thing[]} others @param {Thing} thing */
export function fits(world, others, thing) {
  const side = world.sizes[thing.size];
  const low = world.margin + side / 2;
  const high = world.side - world.margin - side / 2;
  if (thing.x < low || thing.y < low || thing.x > high || thing.y > high) return false;
  return others.every((other) => {
    const reach = (side + world.sizes[other.size]) / 2 + world.gap;
    return Math.abs(thing.x - other.x) >= reach || Math.abs(thing.y - other.y) >= reach;
  });
}

/** The thing at the free spot nearest to where it is, or null where there is no room.
 * @param {World} world @param {Thing[]} others @param {Thing} thing @returns {Thing | null} */
export function settled(world, others, thing) {
  if (fits(world, others, thing)) return thing;
  const side = world.sizes[thing.size];
  const [low, high] = [world.margin + side / 2, world.side - world.margin - side / 2];
  let best = /** @type {Thing | null} */ (null);
  let least = Infinity;
  for (let y = low; y <= high; y += 1) {
    for (let x = low; x <= high; x += 1) {
      const away = (x - thing.x) ** 2 + (y - thing.y) ** 2;
      if (away >= least) continue;
      const moved = { ...thing, x, y };
      if (fits(world, others, moved)) [best, least] = [moved, away];
    }
  }
  return best;
}

/** Some things at random, as the training's pictures have them. @param {World} world @param {() => number} random 0 to 1 */
export function randomThings(world, random) {
  const pick = (/** @type {string[]} */ some) => some[Math.floor(random() * some.length)];
  for (;;) {
    const count = 2 + Math.floor(random() * (world.most - 1));
    const things = /** @type {Thing[]} */ ([]);
    for (let tries = 0; things.length < count && tries < 200; tries++) {
      const size = pick(Object.keys(world.sizes));
      const spot = () => world.margin + world.sizes[size] / 2 + random() * (world.side - 2 * world.margin - world.sizes[size]);
      const thing = { kind: pick(world.kinds), color: pick(Object.keys(world.colors)), size, x: spot(), y: spot(), mirrored: random() < 0.5 };
      if (fits(world, things, thing)) things.push(thing);
    }
    if (things.length === count) return things;
  }
}

/** Questions the picture book asks about a scene, one of a kind. @param {Thing[]} things @returns {string[]} */
export function questionsFor(things) {
  if (!things.length) return ["How many things are there?"];
  const alone = things.filter((thing) => things.filter(({ kind }) => kind === thing.kind).length === 1);
  const [one, other] = [alone[0], alone[1]];
  const many = (/** @type {string} */ kind) => (kind === "fish" ? kind : `${kind}s`);
  return [
    ...(one ? [`What color is the ${one.kind}?`] : []),
    ...(other ? [`Where is the ${other.kind}?`] : []),
    ...(one && other ? [`Which is bigger, the ${one.kind} or the ${other.kind}?`] : []),
    `How many ${many(things[0].kind)} are there?`,
    "Describe the picture.",
  ];
}
