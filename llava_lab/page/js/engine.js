// @ts-check
/**
 * The model: three graphs in onnxruntime-web, a picture seen once, an answer token by token from a growing cache; and the same
 * answer read again with patches covered or cut off. Knows no page.
 */

import { covered } from "./pixels.js";

/**
 * @typedef {{run: (feeds: Record<string, any>) => Promise<Record<string, {data: any, dims: readonly number[]}>>}} Session
 * @typedef {{layers: number, groups: number, head: number, width: number, vocabulary: number, eos: number[], image: number,
 *   cols: number, square: import("./pixels.js").Square, limit: number}} Shape
 * @typedef {{pixels: Float32Array, tokens: {data: Float32Array, dims: readonly number[]}, distance: number}} Seen
 * @typedef {{seen: Seen, ids: number[], prompt: number, image: [number, number], logprobs: number[], logodds: number[], cut: boolean,
 *   cache: Float32Array, length: number, states: Float32Array[], attention: Float32Array[][], sizes: Float32Array[][],
 *   milliseconds: number[]}} Answer `ids` are prompt and answer; `length` positions have been read; states, attention and
 *   sizes have an entry for each position: (states, width), one row for each layer, and one pair for each layer
 */

const LEAST = -3.4028234663852886e38; // of float32: what is masked with it gets no attention

/** Natural log-probability of one token in a row of logits. @param {Float32Array} logits @param {number} token */
export function logProbability(logits, token) {
  let top = -Infinity;
  for (const value of logits) if (value > top) top = value;
  let sum = 0;
  for (const value of logits) sum += Math.exp(value - top);
  return logits[token] - top - Math.log(sum);
}

/** Natural log-odds of one token: its logit against all others together, which does not saturate where the model is sure.
 * @param {Float32Array} logits @param {number} token */
export function logOdds(logits, token) {
  let top = -Infinity;
  for (let i = 0; i < logits.length; i++) if (i !== token && logits[i] > top) top = logits[i];
  let sum = 0;
  for (let i = 0; i < logits.length; i++) if (i !== token) sum += Math.exp(logits[i] - top);
  return logits[token] - top - Math.log(sum);
}

/** The likeliest token that may be chosen. @param {Float32Array} logits @param {number} never */
export function likeliest(logits, never) {
  let best = never === 0 ? 1 : 0;
  for (let i = 0; i < logits.length; i++) if (i !== never && logits[i] > logits[best]) best = i;
  return best;
}

export class Engine {
  /** @param {any} ort @param {{see: Session, say: Session, read: Session}} sessions @param {Shape} shape */
  constructor(ort, sessions, shape) {
    this.ort = ort;
    this.sessions = sessions;
    this.shape = shape;
    this.row = shape.layers * 2 * shape.groups * shape.head; // cache values a position
    this.turn = /** @type {Promise<any>} */ (Promise.resolve());
  }

  /** One at a time: a session cannot run twice at once. @template T @param {() => Promise<T>} work @returns {Promise<T>} */
  queued(work) {
    const next = this.turn.then(work, work);
    this.turn = next.catch(() => {});
    return next;
  }

  /** @param {"see" | "say" | "read"} name @param {Record<string, any>} feeds */
  run(name, feeds) {
    return this.queued(() => this.sessions[name].run(feeds));
  }

  /** @param {Float32Array} data @param {readonly number[]} dims */
  floats(data, dims) {
    return new this.ort.Tensor("float32", data, dims);
  }

  /** @param {Float32Array} pixels @returns {Promise<Seen>} */
  async see(pixels) {
    const { size } = this.shape.square;
    const out = await this.run("see", { pixels: this.floats(pixels, [1, 3, size, size]) });
    return { pixels, tokens: { data: out.picture.data, dims: out.picture.dims }, distance: out.distance.data[0] };
  }

  /** Read more tokens behind what a cache holds; `cut` columns are hidden from them.
   * @param {number[]} ids @param {Seen} seen @param {Float32Array} cache @param {Iterable<number>} [cut] */
  say(ids, seen, cache, cut = []) {
    const { layers, groups, head } = this.shape;
    const past = cache.length / this.row;
    const [rows, keys] = [ids.length, past + ids.length];
    const mask = new Float32Array(rows * keys);
    for (let row = 0; row < rows; row++) {
      mask.fill(LEAST, row * keys + past + row + 1, (row + 1) * keys);
      for (const column of cut) mask[row * keys + column] = LEAST;
    }
    return this.run("say", {
      ids: new this.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [rows]),
      picture: this.floats(seen.tokens.data, seen.tokens.dims),
      cache: this.floats(cache, [past, layers, 2, groups, head]),
      mask: this.floats(mask, [rows, keys]),
    });
  }

  /** Logits of some states, one after the other. @param {Float32Array} states */
  async read(states) {
    const { width, vocabulary } = this.shape;
    const out = await this.run("read", { states: this.floats(states, [states.length / width, width]) });
    return Array.from({ length: states.length / width }, (_, i) => out.logits.data.subarray(i * vocabulary, (i + 1) * vocabulary));
  }

  /** Answer greedily; `heard` gets the answer's ids so far after every token and may say that it is enough.
   * @param {Seen} seen @param {{ids: number[], image: [number, number]}} prompt
   * @param {(ids: number[]) => boolean | void} [heard] @returns {Promise<Answer>} */
  async answer(seen, prompt, heard = () => {}) {
    const { limit, eos, image, width } = this.shape;
    const answer = /** @type {Answer} */ ({
      ...{ seen, ids: [...prompt.ids], prompt: prompt.ids.length, image: prompt.image, logprobs: [], logodds: [], cut: false },
      ...{ cache: new Float32Array((prompt.ids.length + limit) * this.row), length: 0 },
      ...{ states: [], attention: [], sizes: [], milliseconds: [] },
    });
    for (;;) {
      const began = performance.now();
      const out = await this.say(answer.ids.slice(answer.length), seen, answer.cache.subarray(0, answer.length * this.row));
      keep(answer, out, this.row);
      const [logits] = await this.read(answer.states[answer.length - 1].subarray(-width));
      answer.milliseconds.push(performance.now() - began);
      const token = likeliest(logits, image);
      if (eos.includes(token)) return answer;
      answer.ids.push(token);
      answer.logprobs.push(logProbability(logits, token));
      answer.logodds.push(logOdds(logits, token));
      const enough = heard(answer.ids.slice(answer.prompt)) === true;
      if (enough || answer.logprobs.length >= limit) {
        answer.cut = true;
        return answer;
      }
      await breath();
    }
  }

  /** The score of every token of an answer when its predicting positions may not attend to some patches, in any layer.
   * @param {Answer} answer @param {Iterable<number>} patches @param {typeof logProbability} [score] */
  async knockedOut(answer, patches, score = logProbability) {
    const first = answer.prompt - 1;
    const cut = Array.from(patches, (patch) => answer.image[0] + patch);
    const cache = answer.cache.subarray(0, first * this.row);
    return this.scores(answer, await this.say(answer.ids.slice(first, -1), answer.seen, cache, cut), 0, score);
  }

  /** The same when the patches are covered with mid-grey, so that nothing of the model sees them.
   * @param {Answer} answer @param {Iterable<number>} patches @param {typeof logProbability} [score] */
  async occluded(answer, patches, score = logProbability) {
    const seen = await this.see(this.covered(answer.seen, patches));
    const out = await this.say(answer.ids.slice(0, -1), seen, new Float32Array(0));
    return this.scores(answer, out, answer.prompt - 1, score);
  }

  /** @param {Seen} seen @param {Iterable<number>} patches */
  covered(seen, patches) {
    return covered(seen.pixels, patches, this.shape.square, this.shape.cols);
  }

  /** @param {Answer} answer @param {Record<string, {data: Float32Array, dims: readonly number[]}>} out @param {number} first row that predicts
   * @param {typeof logProbability} score */
  async scores(answer, out, first, score) {
    const { width } = this.shape;
    const [states, rows] = out.states.dims;
    const last = out.states.data.subarray(((states - 1) * rows + first) * width, states * rows * width);
    const logits = await this.read(last.slice());
    return logits.map((row, i) => score(row, answer.ids[answer.prompt + i]));
  }

  /** What a position would say at every state, if the model stopped there: the likeliest tokens with their probabilities.
   * @param {Answer} answer @param {number} position @param {number} top */
  async lens(answer, position, top) {
    const rows = await this.read(answer.states[position]);
    return rows.map((logits) => {
      const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
      return order.slice(0, top).map((id) => ({ id, p: Math.exp(logProbability(logits, id)) }));
    });
  }
}

/** Add what a pass gave, position by position. @param {Answer} answer @param {Record<string, {data: Float32Array, dims: readonly number[]}>} out
 * @param {number} row cache values a position */
function keep(answer, out, row) {
  const [states, rows, width] = out.states.dims;
  const [layers, , keys] = out.attention.dims;
  answer.cache.set(out.fresh.data, answer.length * row);
  for (let at = 0; at < rows; at++) {
    const own = new Float32Array(states * width);
    for (let s = 0; s < states; s++) own.set(out.states.data.subarray((s * rows + at) * width, (s * rows + at + 1) * width), s * width);
    answer.states.push(own);
    const upTo = keys - rows + at + 1;
    const of = Array.from({ length: layers }, (_, l) => l * rows + at);
    answer.attention.push(of.map((line) => out.attention.data.slice(line * keys, line * keys + upTo)));
    answer.sizes.push(of.map((line) => out.sizes.data.slice(2 * line, 2 * line + 2)));
  }
  answer.length += rows;
}

/** Let the page paint. */
export function breath() {
  return new Promise((done) => setTimeout(done, 0));
}
