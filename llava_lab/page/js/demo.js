// @ts-check
/**
 * The page: a paper to draw on, a question, the answer as it comes, and where its words came from. Everything is computed here.
 */

import { renderExplorer } from "../../../widgets/js/explorer.js";
import { button, make, setText } from "../../../widgets/js/shared/dom.js";
import { standIn } from "../../../widgets/js/shared/page.js";
import { Effects, LensView, sweep, sweepBar } from "./effects.js";
import { breath, Engine, logOdds } from "./engine.js";
import { foldQuestion, unknownWords } from "./fold.js";
import { Paper } from "./paper.js";
import { normalised } from "./pixels.js";
import { sumOf } from "./rollout.js";
import { Drawing, questionsFor } from "./scene.js";
import { Tokenizer } from "./tokenizer.js";
import { dropsOf, mapOf, mapsOf, packed, spansOf } from "./views.js";

/**
 * @typedef {import("./engine.js").Answer} Answer
 * @typedef {import("./tokenizer.js").AnswerWord} AnswerWord
 * @typedef {import("./views.js").MethodMaps} MethodMaps
 * @typedef {{name: string, knows: string, warning: string, made: string, words: import("./tokenizer.js").Words, shape: import("./engine.js").Shape,
 *   world: import("./scene.js").World, truths: Record<string, string>, palettes: Record<string, string>,
 *   reading: import("./fold.js").Reading | null}} Spec
 */

const OPACITY = 0.85;

class Demo {
  /** @param {Spec} spec @param {Uint8Array} shares @param {HTMLElement} el */
  constructor(spec, shares, el) {
    this.spec = spec;
    this.stop = new AbortController();
    const { signal } = this.stop;
    this.tokenizer = new Tokenizer(spec.words);
    this.engine = /** @type {Engine | null} */ (null);
    this.work = new AbortController(); // what belongs to the answer shown
    this.asking = false;
    this.enough = false;
    this.live = make("div", "lab-live", [], { "aria-live": "polite" });
    this.paper = new Paper(new Drawing(spec.world, shares), () => this.drawn(), (text) => setText(this.live, text), signal);
    this.input = /** @type {HTMLInputElement} */ (make("input", "lab-input", [], { type: "text", "aria-label": "Your question", autocomplete: "off", spellcheck: "false", maxlength: "300" }));
    this.go = button("Ask", () => {}, signal, "lab-button lab-primary");
    this.go.type = "submit";
    this.go.disabled = true;
    this.chips = make("div", "lab-suggestions", [], { role: "group", "aria-label": "Questions to try" });
    this.state = make("p", "lab-state", ["Opening the model…"], { role: "status" });
    this.answer = make("p", "lab-reply", [], { "aria-live": "polite", "aria-label": "Answer" });
    this.notes = make("ul", "lab-notes lab-told", [], { "aria-label": "To know first" });
    this.below = make("div", "lab-below");
    el.append(this.build());
    this.drawn();
    this.input.value = questionsFor(this.paper.things)[0];
  }

  build() {
    const { spec } = this;
    const head = make("header", "lab-top-head", [
      make("h1", "", [`Ask ${spec.name}, a LLaVA that lives in this page`]),
      make("p", "lab-can", [`${spec.knows} ${spec.warning}`]),
    ]);
    const form = make("form", "lab-form", [this.input, this.go]);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.asking) this.enough = true;
      else this.ask();
    }, { signal: this.stop.signal });
    const talk = make("section", "lab-talk", [make("h2", "lab-title", ["Ask about it"]), form, this.chips, this.answer, this.notes, this.state], { "aria-label": "Question and answer" });
    const stage = make("section", "lab-talk", [make("h2", "lab-title", ["Draw a scene"]), this.paper.root], { "aria-label": "The picture" });
    const top = make("div", "lab-card lab-two", [stage, talk]);
    const foot = make("footer", "lab-foot", [spec.made]);
    const licence = make("details", "lab-licence", [make("summary", "", ["Licences"]), make("pre", "", [document.getElementById("lab-licence")?.textContent ?? ""])]);
    return make("div", "lab-widget lab-demo", [head, top, this.below, foot, licence, this.live]);
  }

  /** The model is there. @param {Engine} engine */
  ready(engine) {
    this.engine = engine;
    this.go.disabled = false;
    setText(this.state, "Ready. Nothing you draw, open or ask leaves this page.");
  }

  /** The picture changed: other questions suit it. */
  drawn() {
    const texts = this.paper.own ? ["What is in the picture?", "What color is the thing?"] : questionsFor(this.paper.things);
    const ask = (/** @type {string} */ text) => {
      this.input.value = text;
      if (this.engine && !this.asking) this.ask();
    };
    this.chips.replaceChildren(...texts.map((text) => button(text, () => ask(text), this.stop.signal, "lab-button lab-suggestion")));
  }

  async ask() {
    const { engine, tokenizer, spec } = this;
    const asked = this.input.value;
    const refused = tokenizer.refusal(asked);
    if (refused || !engine) return setText(this.state, refused || "The model is still opening.");
    const question = spec.reading ? foldQuestion(asked, spec.reading) : asked.trim();
    this.work.abort();
    this.work = new AbortController();
    this.below.replaceChildren();
    this.asking = true;
    this.enough = false;
    setText(this.go, "Stop");
    setText(this.answer, "…");
    setText(this.state, "Looking…");
    this.notes.replaceChildren();
    await breath();
    try {
      const picture = this.paper.picture();
      const seen = await engine.see(normalised(picture, spec.shape.square));
      const notes = this.notesOf(asked, question, seen.distance);
      this.notes.replaceChildren(...notes.map((text) => make("li", "", [text])));
      const answer = await engine.answer(seen, tokenizer.prompt(question), (ids) => {
        setText(this.answer, tokenizer.decode(ids).trim());
        return this.enough;
      });
      const ids = answer.ids.slice(answer.prompt);
      setText(this.answer, tokenizer.decode(ids).trim() + (answer.cut ? " …" : "") || "(the model said nothing)");
      setText(this.state, timing(answer));
      if (ids.length) await this.explain(picture, question, answer, notes);
    } catch (error) {
      setText(this.state, `That failed: ${error instanceof Error ? error.message : error}`);
    }
    this.asking = false;
    setText(this.go, "Ask");
  }

  /** @param {string} asked @param {string} read @param {number} distance @returns {string[]} */
  notesOf(asked, read, distance) {
    const { name, reading } = this.spec;
    const notes = reading && asked.toLowerCase().trim() !== read.toLowerCase() ? [`Read as “${read}”.`] : [];
    const strange = reading ? unknownWords(read, reading) : [];
    if (strange.length) notes.push(`Outside the words that ${name} learned with pictures: ${strange.slice(0, 5).join(", ")}. Its answer may mean nothing.`);
    if (distance > 1) {
      notes.push(`Unlike the pictures that ${name} was trained on (${distance.toFixed(1)} times the distance that its own stay within): its answer may mean nothing.`);
    }
    return notes;
  }

  /** Where the words came from. @param {import("./pixels.js").Rgb} picture @param {string} question @param {Answer} answer @param {string[]} notes */
  async explain(picture, question, answer, notes) {
    const { signal } = this.work;
    const engine = /** @type {Engine} */ (this.engine);
    const ids = answer.ids.slice(answer.prompt);
    const words = this.tokenizer.groupWords(ids);
    const spans = spansOf(words, ids.length);
    const { size } = this.spec.shape.square;
    const map = mapOf(picture.width, picture.height, size, this.spec.shape.cols);
    const file = await pngOf(picture);
    const methods = mapsOf(answer, words, this.spec.truths);
    const effects = new Effects(engine, answer, words, signal);
    const lens = new LensView(engine, answer, (id) => this.tokenizer.piece(id), map);
    const host = make("div", "");
    const bar = sweepBar((name) => this.sweep(name, answer, spans, methods, bar, show), signal);
    let close = () => {};
    const said = words.findLastIndex(({ text }) => /[\p{L}\p{N}]/u.test(text)); // the last word, not the full stop behind it
    let kept = { word: Math.max(0, said), method: "rollout", selected: /** @type {number[]} */ ([]) };
    const show = (/** @type {string} */ method) => {
      close();
      const state = { ...kept, method, layer: 0, pointed: -1, reply: {} };
      const about = { question, answer: this.tokenizer.decode(ids).trim(), model: this.spec.name, seed: 0, told: notes, cut: answer.cut };
      const chips = spans.map(([start, stop], i) => ({ ...chipOf(words, i), p: Math.exp(sumOf(answer.logprobs, start, stop)) }));
      const { methods: described, maps, scales } = packed(methods, chips.length);
      const spec = {
        ...{ ...about, chips, map, methods: described, picture: "image/png", palettes: this.spec.palettes },
        ...{ opacity: OPACITY, smooth: false, can_ask: true, p: chips[chips.length - 1].p },
      };
      const plain = standIn({ ...state, spec, picture: file, maps, scales });
      const model = { ...plain, send: (/** @type {any} */ message) => this.askWithout(message, answer, question, plain) };
      const undo = renderExplorer({ model, el: host });
      const stay = () => (kept = { word: plain.get("word"), method: plain.get("method"), selected: plain.get("selected") });
      for (const name of ["word", "method", "selected"]) plain.on(`change:${name}`, stay);
      plain.on("change:selected", () => {
        effects.measure(plain.get("selected"));
        if (plain.get("selected").length) lens.show(plain.get("selected").at(-1));
      });
      plain.on("change:pointed", () => lens.show(plain.get("pointed")));
      close = undo;
    };
    show("rollout");
    const more = make("div", "lab-card lab-two lab-more", [effects.root, lens.root]);
    this.below.replaceChildren(make("h2", "lab-title", ["Where each word came from"]), host, make("div", "lab-sweeps", [bar.root]), more);
    signal.addEventListener("abort", () => close());
  }

  /** A map made of a pass for each patch. @param {string} name @param {Answer} answer @param {number[][]} spans @param {MethodMaps[]} methods
   * @param {ReturnType<typeof sweepBar>} bar @param {(method: string) => void} show */
  async sweep(name, answer, spans, methods, bar, show) {
    const { signal } = this.work;
    const engine = /** @type {Engine} */ (this.engine);
    const patches = answer.image[1] - answer.image[0];
    if (methods.some((method) => method.name === name)) return show(name);
    for (const one of bar.buttons) one.disabled = true;
    const began = performance.now();
    const measure = (/** @type {number} */ patch) => (name === "occlusion" ? engine.occluded(answer, [patch], logOdds) : engine.knockedOut(answer, [patch], logOdds));
    const rows = await sweep(patches, measure, (done) => {
      if (done % 6 === 0) setText(bar.state, `${done} of ${patches} patches`);
      return !signal.aborted;
    });
    for (const one of bar.buttons) one.disabled = false;
    if (!rows) return;
    const seconds = (performance.now() - began) / 1000;
    const note = "How much of the word's log-odds is lost without the patch; below zero it became likelier.";
    methods.splice(methods.length - 1, 0, { name, control: false, caption: this.spec.truths[name], notes: [note], maps: dropsOf(answer.logodds, rows, spans) });
    show(name);
    setText(bar.state, `${patches} patches in ${seconds.toFixed(1)} s`);
  }

  /** Ask the same with some patches covered, for the explorer. @param {any} message @param {Answer} answer @param {string} question
   * @param {import("../../../widgets/js/shared/panel.js").Model} model */
  async askWithout(message, answer, question, model) {
    const engine = /** @type {Engine} */ (this.engine);
    const reply = { id: message.id, selected: message.selected };
    model.set("reply", { ...reply, state: "busy" });
    try {
      const seen = await engine.see(engine.covered(answer.seen, message.selected));
      const other = await engine.answer(seen, this.tokenizer.prompt(question));
      const ids = other.ids.slice(other.prompt);
      const words = this.tokenizer.groupWords(ids).map(({ text, start, stop }) => ({ text, p: Math.exp(sumOf(other.logprobs, start, stop)) }));
      model.set("reply", { ...reply, state: "done", answer: this.tokenizer.decode(ids).trim(), words, p: Math.exp(sumOf(other.logprobs, 0, ids.length)) });
    } catch (error) {
      model.set("reply", { ...reply, state: "error", message: String(error) });
    }
  }
}

/** @param {AnswerWord[]} words @param {number} i */
function chipOf(words, i) {
  return i < words.length ? { text: words[i].text, kind: "word", key: `word ${i}` } : { text: "whole answer", kind: "answer", key: "answer" };
}

/** @param {Answer} answer */
function timing({ milliseconds }) {
  const later = milliseconds.slice(1).sort((a, b) => a - b);
  const middle = later.length ? `, then ${later[later.length >> 1].toFixed(0)} ms a token (median of ${later.length})` : "";
  return `Question read in ${milliseconds[0].toFixed(0)} ms${middle}.`;
}

/** @param {import("./pixels.js").Rgb} picture */
async function pngOf({ data, width, height }) {
  const rgba = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let i = 0; i < width * height; i++) for (let c = 0; c < 3; c++) rgba[4 * i + c] = data[3 * i + c];
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d")?.putImageData(new ImageData(rgba, width, height), 0, 0);
  const blob = /** @type {Blob} */ (await new Promise((done) => canvas.toBlob(done)));
  return new Uint8Array(await blob.arrayBuffer());
}

// -- opening ---------------------------------------------------------------------------------

/** The bytes of one of the page's parts; the text is let go. @param {string} id */
async function partOf(id) {
  const node = /** @type {HTMLElement} */ (document.getElementById(id));
  const text = atob(node.textContent ?? "");
  node.remove();
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Open the page; the model comes after the paper can be drawn on. @param {any} ort */
export async function openDemo(ort) {
  const spec = /** @type {Spec} */ (JSON.parse(document.getElementById("lab-spec")?.textContent ?? "{}"));
  const demo = new Demo(spec, await partOf("lab-shares"), /** @type {HTMLElement} */ (document.getElementById("lab-demo")));
  try {
    ort.env.wasm.numThreads = 1; // a page from disk has no shared memory
    ort.env.wasm.proxy = false;
    ort.env.wasm.wasmBinary = await partOf("lab-wasm");
    const sessions = /** @type {any} */ ({});
    for (const name of ["see", "say", "read"]) {
      await breath();
      sessions[name] = await ort.InferenceSession.create(await partOf(`lab-${name}`), { executionProviders: ["wasm"] });
    }
    demo.ready(new Engine(ort, sessions, spec.shape));
  } catch (error) {
    setText(demo.state, `The model could not be opened (${error instanceof Error ? error.message : error}). It needs a browser of 2023 or later.`);
  }
}
