// @ts-check
/**
 * The tokenizer and the prompt as Python's: byte-level pairs merged by rank, and one image token repeated for every patch.
 * Knows no page and no model.
 */

/**
 * @typedef {{vocabulary: Record<string, number>, merges: [string, string][], special: Record<string, number>, start: number,
 *   before: string, after: string, image: number, patches: number}} Words what Python says of the tokenizer and the prompt
 * @typedef {{text: string, start: number, stop: number}} AnswerWord tokens [start, stop) of the answer spell it
 */

const SPACE = "\\t\\n\\v\\f\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"; // Rust's and Python's white space
const PRE = new RegExp(`'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]+`, "gu");
const ENDS = new RegExp(`^[${SPACE}\\x1c-\\x1f]+|[${SPACE}\\x1c-\\x1f]+$`, "gu"); // what Python's str.strip takes away
const SPACELESS = "\\u3040-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff"; // kana and Han
const LETTER = `(?:(?![${SPACELESS}])[\\p{L}\\p{N}_][\\p{M}\\u200c\\u200d]*)`; // with the marks that belong to it
const WORD = new RegExp(`[${SPACELESS}]|${LETTER}+(?:['’.,:-]${LETTER}+)*|[^\\p{L}\\p{N}_${SPACE}]+`, "gu");
const UNFINISHED = "\ufffd"; // what decoding shows for bytes that are not a whole character yet

/** The visible letter that stands for each byte in a vocabulary's pieces (GPT-2's table). */
function byteLetters() {
  const plain = [[33, 126], [161, 172], [174, 255]].flatMap(([lo, hi]) => Array.from({ length: hi - lo + 1 }, (_, i) => lo + i));
  let spare = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(plain.includes(byte) ? byte : spare++));
}

/** @param {string} text */
export function stripped(text) {
  return text.replace(ENDS, "");
}

export class Tokenizer {
  /** @param {Words} words */
  constructor(words) {
    this.words = words;
    this.letters = byteLetters();
    this.bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
    this.ranks = new Map(words.merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
    this.names = /** @type {string[]} */ ([]);
    for (const [name, id] of Object.entries(words.vocabulary)) this.names[id] = name;
    this.special = new Set(Object.values(words.special));
    const marks = Object.keys(words.special).map((mark) => mark.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.marks = new RegExp(`(${marks.join("|")})`, "g");
  }

  /** Token ids of a text, the first being what starts every sequence. @param {string} text @returns {number[]} */
  encode(text) {
    const ids = [this.words.start];
    for (const part of text.split(this.marks)) {
      if (part in this.words.special) ids.push(this.words.special[part]);
      else for (const [piece] of part.matchAll(PRE)) ids.push(...this.merged(piece));
    }
    return ids;
  }

  /** The prompt around a question as the model reads it. @param {string} question */
  prompt(question) {
    const { before, after, image, patches } = this.words;
    const ids = this.encode(before + stripped(question) + after);
    const at = ids.indexOf(image);
    ids.splice(at, 1, ...new Array(patches).fill(image));
    return { ids, image: /** @type {[number, number]} */ ([at, at + patches]) };
  }

  /** A question that would be read as something else than text, or is none; "" where it may be asked.
   * @param {string} question */
  refusal(question) {
    if (!stripped(question)) return "Ask something, for example: What color is the car?";
    const found = question.match(this.marks);
    return found ? `The question holds ${found[0]}, which the prompt adds itself; leave it out.` : "";
  }

  /** @param {string} piece */
  merged(piece) {
    let parts = Array.from(new TextEncoder().encode(piece), (byte) => this.letters[byte]);
    while (parts.length > 1) {
      let best = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) best = Math.min(best, this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity);
      if (best === Infinity) break;
      const [left, right] = this.words.merges[best];
      const next = [];
      for (let i = 0; i < parts.length; i++) {
        const joins = parts[i] === left && parts[i + 1] === right;
        next.push(joins ? left + right : parts[i]);
        if (joins) i++;
      }
      parts = next;
    }
    return parts.map((part) => this.words.vocabulary[part]).filter((id) => id !== undefined);
  }

  /** The text of some tokens, special ones left out. @param {number[]} ids */
  decode(ids) {
    const letters = ids.filter((id) => !this.special.has(id)).flatMap((id) => [...this.names[id]]);
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(letters, (letter) => this.bytes.get(letter) ?? 0));
  }

  /** A readable text for one token. @param {number} id */
  piece(id) {
    const text = this.special.has(id) ? this.names[id] : this.decode([id]);
    return text && !text.includes(UNFINISHED) ? text : this.names[id];
  }

  /** The answer's words in order, each with the tokens that spell it. @param {number[]} ids @returns {AnswerWord[]} */
  groupWords(ids) {
    const text = this.decode(ids);
    const ends = ids.map((_, i) => sharedLength(this.decode(ids.slice(0, i + 1)), text));
    for (let i = 1; i < ends.length; i++) ends[i] = Math.max(ends[i], ends[i - 1]);
    const spans = Array.from(text.matchAll(WORD), (found) => [found.index, found.index + found[0].length]);
    const owned = /** @type {number[][]} */ (spans.map(() => []));
    [0, ...ends].slice(0, -1).forEach((begin, token) => {
      const word = spans.findIndex(([, stop]) => stop > begin);
      if (word >= 0) owned[word].push(token);
    });
    const words = /** @type {AnswerWord[]} */ ([]);
    spans.forEach(([lo, hi], number) => {
      const tokens = owned[number];
      const last = words[words.length - 1];
      if (tokens.length) words.push({ text: text.slice(lo, hi), start: tokens[0], stop: tokens[tokens.length - 1] + 1 });
      else if (last) last.text += text.slice(spans[number - 1][1], lo) + text.slice(lo, hi);
    });
    return words;
  }
}

/** @param {string} a @param {string} b */
function sharedLength(a, b) {
  let at = 0;
  while (at < a.length && at < b.length && a[at] === b[at]) at++;
  return at;
}
