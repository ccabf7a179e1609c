// @ts-check
/**
 * A question folded into the words the model was trained on, and what is left over: the rules are Python's own, sent with the page.
 */

/**
 * @typedef {{is: string, not: string, same: Record<string, string>, phrases: [string, string][], before: string, after: string,
 *   signs: Record<string, string>, asking: string, known: string[]}} Reading patterns as Python writes them
 */

const PLAIN_WORD = /[\p{L}\p{N}]+(?:'[\p{L}\p{N}]+)?/gu;

/** @param {string} question @param {Reading} rules */
export function foldQuestion(question, rules) {
  const [line, ...rest] = question.trim().split("\n");
  const plain = Array.from(line, (sign) => rules.signs[sign] ?? sign).join("");
  let text = plain.toLowerCase().split(/\s+/).filter(Boolean).join(" ");
  text = untilStill(text, new RegExp(rules.before));
  let body = text.replace(/[ .?!…,;]+$/, "");
  const mark = text.slice(body.length);
  body = untilStill(body, new RegExp(rules.after));
  body = body.replace(/\bcolour/g, "color").replace(new RegExp(rules.is, "g"), (_, one, other) => `${one ?? other} is`);
  body = body.replace(new RegExp(rules.not, "g"), (_, verb) => `${verb} not`);
  body = body.replace(PLAIN_WORD, (word) => rules.same[word] ?? word);
  for (const [pattern, instead] of rules.phrases) body = body.replace(new RegExp(pattern, "g"), instead.replaceAll("\\", "$"));
  if (!body) return question.trim();
  const asks = new RegExp(`^${rules.asking}`).test(body);
  const end = mark.includes("?") || asks ? "?" : ".";
  return [body[0].toUpperCase() + body.slice(1) + end, ...rest].join("\n");
}

/** The words of a question that the model never read with pictures. @param {string} question @param {Reading} rules */
export function unknownWords(question, rules) {
  const words = new Set(question.toLowerCase().match(PLAIN_WORD) ?? []);
  return [...words].filter((word) => !rules.known.includes(word));
}

/** @param {string} text @param {RegExp} pattern */
function untilStill(text, pattern) {
  for (let bare = text.replace(pattern, ""); bare !== text; bare = text.replace(pattern, "")) text = bare;
  return text;
}
