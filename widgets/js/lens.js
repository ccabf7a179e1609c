// @ts-check
/**
 * TokenLens: what each image patch would say at each state. The picture is coloured by a word's probability or by how
 * undecided a patch is, with each patch's likeliest word on it where there is room; the table beside it holds the words
 * of the patch pointed at, or of the one that is locked. A press locks a patch or lets it go; arrows move the lock.
 *
 * Of several lenses one is shown at a time; choosing another changes what is read in place, so that every part follows.
 *
 * All of it is in the page. Python hears of what is kept: `word`, `state`, `kind` (the lens), `selected` (the locked patch).
 */

import { blankCanvas, contextOf } from "./shared/canvas.js";
import { button, make, opacitySlider, segmented, setText } from "./shared/dom.js";
import { ARROWS, pointerGestures } from "./shared/gestures.js";
import { firstOnPicture, onPicture, patchBox, patchName, step } from "./shared/grid.js";
import { MapPanel, STAGE } from "./shared/map_panel.js";
import { shows } from "./shared/panel.js";
import { LENSES, commonest, entropyQuantity, findWord, lensMap, readLens, rootProbability, spokenPatch } from "./lens_data.js";
import { spokenState, sureQuantity, topPieces, valueText, wordQuantity, wordStatus } from "./lens_data.js";
import { LensCurve, lensTable, nearList, wordField } from "./lens_parts.js";

/**
 * @import { FoundWord, Lens, LensSpec, Quantity } from "./lens_data.js"
 * @typedef {ReturnType<TokenLens["view"]>} LensState
 * @typedef {{locked: () => number, lock: (patch: number) => void, point: (change: {hover?: number, cursor?: number}) => void,
 *   say: (patch: number) => void}} LockHost -1 is no patch
 */

const COLORS = ["Word", "Entropy", "Likeliest word"];
const [BY_WORD, BY_ENTROPY] = [0, 1];
const KEYS = "Arrow keys move, space locks a patch, escape unlocks it.";
const STATES_SAID = "State 0 is what the connector gives; state l is the stream after l layers. Entropy in nats: 0 is decided.";
const ROOM = 26; // CSS pixels a patch must be wide for a word to be read on it
const FAINT = 0.6; // of a word that the model is not sure of at all

class TokenLens extends MapPanel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["word", "state", "kind"]);
    this.lens = readLens(model.get("maps"), this.spec, model.get("kind"));
    const { map, opacity } = this.spec;
    this.display = { opacity, smooth: false, spotlight: false, ownScale: false, words: true, color: BY_ENTROPY };
    this.peek = { state: -1 };
    this.typed = /** @type {string | null} */ (null); // not entered yet
    this.heardWord = /** @type {string | null} */ (null);
    this.derive();
    this.surface.canvas.setAttribute("aria-label", `The picture in ${map.rows} by ${map.cols} patches. ${KEYS}`);
    this.written = new PatchWords(this.lens);
    const pick = (/** @type {number} */ state) => this.pickState(state);
    const peek = (/** @type {number} */ state) => this.set(this.peek, { state });
    this.curve = new LensCurve(this.spec.states, pick, peek, this.refresh, this.stop.signal);
    this.open(this.build(pick, peek), el);
  }

  /** What is worked out once from the lens. */
  derive() {
    this.entropy = entropyQuantity(this.lens);
    this.sure = sureQuantity(this.lens);
    this.looked = this.find("");
    this.everywhere = this.lens.spec.states.map((_, state) => commonest(this.lens, state));
    this.shown = /** @type {{key: string, map: import("./shared/maps.js").Shown | null}} */ ({ key: "", map: null });
  }

  /** @param {(state: number) => void} pick @param {(state: number) => void} peek */
  build(pick, peek) {
    const spec = /** @type {LensSpec} */ (this.spec);
    const { lens } = this;
    const { signal } = this.stop;
    const type = (/** @type {string} */ text) => this.type(text);
    const find = this.add(wordField(lens, type, (word) => this.enter(word), signal));
    const figure = this.figure([], lensReadout(lens), STAGE);
    const near = nearList(lens);
    const words = [this.add(lensTable(lens, pick, peek, signal)), ...(near ? [this.add(near)] : [])];
    const said = make("div", "lab-side lab-scroll", words);
    const notes = make("ul", "lab-notes", spec.notes.map((text) => make("li", "", [text])));
    const about = `${spec.lenses.map((kind) => LENSES[kind]).join(", ")} · ${spec.states.length} states · ${this.patchesText}`;
    const answer = make("span", "lab-lens-answer", [spec.answer]);
    const text = { class: "lab-lens lab-screen", label: "Token lens", about, tail: [document.createTextNode(" "), answer] };
    const controls = this.add(this.controls());
    if (spec.lenses.length > 1) controls.prepend(this.add(this.lensChoice()));
    const body = make("div", "lab-body", [figure, this.curve.root, said]);
    return this.card(text, [find, controls, body, notes]);
  }

  /** Which of several lenses is shown. */
  lensChoice() {
    const { lenses } = this.spec;
    const names = lenses.map((/** @type {string} */ kind) => LENSES[kind][0].toUpperCase() + LENSES[kind].slice(1));
    const pick = (/** @type {number} */ i) => {
      this.keep("kind", lenses[i]);
      const { quantity, state } = this.view();
      this.say(`${names[i]}. ${spokenState(this.lens, quantity, state)}`);
    };
    const choice = segmented("Lens", names, pick, this.stop.signal);
    const root = make("div", "lab-lens-choice lab-lens-kinds", [make("span", "lab-label", ["Lens"]), choice.root]);
    return { root, update: () => choice.show(lenses.indexOf(this.lens.kind), -1) };
  }

  /** What the picture is coloured by, on which scale, and whether words are written on it. */
  controls() {
    const { signal } = this.stop;
    const change = (/** @type {object} */ display) => this.set(this.display, display);
    const color = segmented("Colour by", COLORS, (i) => change({ color: i }), signal);
    const scale = segmented("Scale", ["All states", "This state"], (i) => change({ ownScale: i === 1 }), signal);
    const words = segmented("Words on the picture", ["Words", "None"], (i) => change({ words: i === 0 }), signal);
    const opacity = opacitySlider(this.display, change, signal);
    const unlock = button("Unlock", () => this.lock(-1), signal);
    const labelled = [color, scale, words].map((one, i) =>
      make("div", "lab-lens-choice", [make("span", "lab-label", [["Colour", "Scale", "Write"][i]]), one.root]),
    );
    return {
      root: make("div", "lab-bar-row", [...labelled, opacity.root, unlock]),
      update: (/** @type {LensState} */ { display, color: by, locked, written }) => {
        color.show(by, -1);
        /** @type {HTMLButtonElement} */ (color.buttons[BY_WORD]).disabled = !this.looked.found;
        scale.show(Number(display.ownScale), -1);
        words.show(Number(!display.words), -1);
        labelled[2].hidden = !written;
        opacity.show(display.opacity);
        /** @type {HTMLButtonElement} */ (unlock).disabled = locked < 0;
      },
    };
  }

  listen() {
    const { signal } = this.stop;
    const host = {
      locked: () => this.locked,
      lock: (/** @type {number} */ patch) => this.lock(patch),
      point: (/** @type {object} */ change) => this.point(change),
      say: (/** @type {number} */ patch) => this.say(this.spoken(patch)),
    };
    lockGestures(this.surface.canvas, this.spec.map, host, signal);
    const press = (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      if (event.target instanceof HTMLInputElement && event.target.type === "text") this.enter("");
      else this.lock(-1);
    };
    this.root?.addEventListener("keydown", press, { signal });
  }

  get locked() {
    return /** @type {number[]} */ (this.model.get("selected"))[0] ?? -1;
  }

  /** @param {number} patch -1 for none */
  lock(patch) {
    if (patch === this.locked) return;
    this.select(new Set(patch < 0 ? [] : [patch]));
    this.say(patch < 0 ? "No patch is locked." : this.spoken(patch));
  }

  /** @param {number} patch */
  spoken(patch) {
    return spokenPatch(this.lens, patch, this.view().state, patch === this.locked);
  }

  /** @param {number} index */
  pickState(index) {
    this.peek.state = -1;
    this.keep("state", this.spec.states[index]);
    const { quantity, state } = this.view();
    this.say(spokenState(this.lens, quantity, state));
  }

  /** What is typed is looked up; Python hears of it when it is entered. @param {string} text */
  type(text) {
    this.typed = text;
    this.display.color = text.trim() ? BY_WORD : BY_ENTROPY;
    this.refresh();
  }

  /** @param {string} word */
  enter(word) {
    this.type(word);
    this.typed = null;
    this.heardWord = word.trim();
    if (this.model.get("word") !== word.trim()) this.keep("word", word.trim());
  }

  /** Python may have set a word of its own. */
  hearWord() {
    const word = this.model.get("word");
    if (word === this.heardWord) return;
    this.heardWord = word;
    this.type(word);
    this.typed = null;
  }

  /** Python or the reader may have chosen another lens. */
  hearKind() {
    const kind = this.model.get("kind");
    if (kind === this.lens.kind) return;
    Object.assign(this.lens, readLens(this.model.get("maps"), this.spec, kind)); // every part holds this one object
    this.written.key = "";
    this.derive();
  }

  /** A word as it is found, kept while it is the one looked for. @param {string} given */
  lookUp(given) {
    const word = given.trim();
    if (this.looked.word !== word) this.looked = this.find(word);
    return this.looked;
  }

  /** @param {string} word */
  find(word) {
    const found = /** @type {FoundWord | null} */ (word ? findWord(this.lens, word) : null);
    const quantity = found && wordQuantity(this.lens, found);
    return { word, found, quantity, status: wordStatus(this.lens, found) };
  }

  view() {
    this.hearKind();
    this.hearWord();
    const { spec, lens, display, focus, locked, selected } = this;
    const looked = this.lookUp(this.typed ?? this.model.get("word"));
    const kept = Math.max(0, spec.states.indexOf(this.model.get("state")));
    const state = this.peek.state >= 0 ? this.peek.state : kept;
    const color = display.color === BY_WORD && !looked.quantity ? BY_ENTROPY : display.color;
    const quantity = [looked.quantity, this.entropy, this.sure][color] ?? this.entropy;
    const shown = this.mapOf(quantity, state);
    const patch = locked >= 0 ? locked : focus;
    const number = spec.states[state];
    return {
      ...{ map: spec.map, display, shown, quantity, color, state, kept, focus, locked, selected, patch, said: "" },
      ...{ palette: "sequential", mean: this.surface.mean, written: this.written.fits(this.surface.canvas, this.surface.dot) },
      ...{ word: this.typed ?? looked.word, status: looked.status, partly: looked.found?.kind === "kept" },
      title: `${quantity.name} at state ${number}`,
      scaleSaid: display.ownScale ? "colours of this state alone" : "one colour scale for all states",
      caption: `${LENSES[lens.kind]}, state ${number}`,
      ...this.tableView(patch, looked.found),
      entropy: (/** @type {number} */ index) => this.entropyText(index, patch),
      curve: this.curveView(quantity, state, kept, patch),
      lens,
    };
  }

  /** @param {number} patch @param {FoundWord | null} found */
  tableView(patch, found) {
    const { spec, lens } = this;
    const where = patch < 0 ? "" : `${patchName(spec.map, patch)}${patch === this.locked ? " · locked" : ""}`;
    const rows = () => (patch < 0 ? this.everywhere : spec.states.map((_, state) => topPieces(lens, state, patch)));
    const bars = patch < 0 ? "Bars: share of patches whose likeliest word it is; entropy is their mean." : "Bars: probability.";
    return {
      key: `${lens.kind} ${patch} ${found?.word ?? ""}`,
      tableTitle: patch < 0 ? "Likeliest words, over all patches" : `Likeliest words at ${where}`,
      tableCaption: `${bars} ${STATES_SAID}`,
      rows,
      hits: found?.pieces ?? new Set(/** @type {number[]} */ ([])),
    };
  }

  /** @param {number} state index @param {number} patch */
  entropyText(state, patch) {
    const value = patch < 0 ? this.entropy.curve[state] : this.entropy.values[state * this.lens.cells + patch];
    return value.toFixed(2);
  }

  /** @param {Quantity} quantity @param {number} state @param {number} kept @param {number} patch */
  curveView(quantity, state, kept, patch) {
    const { lens } = this;
    const at = (/** @type {number} */ index) => quantity.values[index * lens.cells + patch];
    const line = patch < 0 ? null : Float32Array.from({ length: lens.states }, (_, index) => at(index));
    const over = quantity.most ? "highest of all patches" : "mean over patches";
    return {
      key: `${lens.kind} ${quantity.key} ${patch}`,
      ...{ curve: quantity.curve, line, state, kept },
      hi: quantity.most ? quantity.hi : Math.max(...quantity.curve, ...(line ?? [])),
      said: `${over}: ${quantity.text(quantity.curve[state])}`,
      lineSaid: patch < 0 ? "" : `this patch: ${quantity.text(at(state))}`,
    };
  }

  /** The map at a state, made once while it is shown.
   * @param {Quantity} quantity @param {number} state */
  mapOf(quantity, state) {
    const key = [quantity.key, state, this.display.ownScale].join();
    if (key !== this.shown.key) this.shown = { key, map: lensMap(this.lens, quantity, state, this.display.ownScale) };
    return this.shown.map;
  }

  paint() {
    const view = super.paint();
    if (view.display.words) this.written.paint(this.surface.canvas, this.surface.dot, view.state);
    this.curve.update(view.curve);
    return view;
  }
}

/** The likeliest words of one state over the picture, painted again only when they change. */
export class PatchWords {
  /** @param {Lens} lens */
  constructor(lens) {
    this.lens = lens;
    this.layer = blankCanvas(1, 1);
    this.key = "";
  }

  /** CSS pixels a patch is wide. @param {HTMLCanvasElement} canvas @param {number} dot */
  cell(canvas, dot) {
    const [left, , right] = patchBox(this.lens.spec.map, 0);
    return ((right - left) * canvas.width) / this.lens.spec.map.width / dot;
  }

  /** @param {HTMLCanvasElement} canvas @param {number} dot */
  fits(canvas, dot) {
    return this.cell(canvas, dot) >= ROOM;
  }

  /** @param {HTMLCanvasElement} canvas @param {number} dot @param {number} state index */
  paint(canvas, dot, state) {
    if (!this.fits(canvas, dot)) return;
    const key = [canvas.width, canvas.height, dot, state].join();
    if (key !== this.key) this.draw(canvas, dot, state);
    this.key = key;
    contextOf(canvas).drawImage(this.layer, 0, 0);
  }

  /** @param {HTMLCanvasElement} canvas @param {number} dot @param {number} state index */
  draw(canvas, dot, state) {
    const { lens, layer } = this;
    const { map } = lens.spec;
    [layer.width, layer.height] = [canvas.width, canvas.height];
    const ctx = contextOf(layer);
    const k = canvas.width / map.width;
    const room = this.cell(canvas, dot) * dot;
    const size = Math.min(13 * dot, Math.max(8.5 * dot, 0.27 * room));
    ctx.font = `600 ${size}px system-ui, -apple-system, "DejaVu Sans", sans-serif`;
    [ctx.textAlign, ctx.textBaseline, ctx.lineJoin] = ["center", "middle", "round"];
    for (let patch = 0; patch < lens.cells; patch++) {
      if (!onPicture(map, patch)) continue;
      const first = (state * lens.cells + patch) * lens.top;
      const [left, top, right, bottom] = patchBox(map, patch);
      ctx.globalAlpha = FAINT + (1 - FAINT) * rootProbability(lens.probs[first]);
      cased(ctx, lens.texts[lens.ids[first]], (k * (left + right)) / 2, (k * (top + bottom)) / 2, room - 2 * dot, dot);
    }
  }
}

/** White with a dark casing, squeezed a little where it would not fit.
 * @param {CanvasRenderingContext2D} ctx @param {string} text @param {number} x @param {number} y @param {number} room
 * @param {number} dot */
function cased(ctx, text, x, y, room, dot) {
  let shown = text;
  while (shown.length > 2 && ctx.measureText(shown).width > 1.3 * room) shown = `${shown.slice(0, -2)}…`;
  ctx.lineWidth = 2.5 * dot;
  ctx.strokeStyle = "rgba(8, 12, 24, 0.8)";
  ctx.strokeText(shown, x, y, room);
  ctx.fillStyle = "#ffffff";
  ctx.fillText(shown, x, y, room);
}

/** Place and value of the patch pointed at, else of the locked one.
 * @param {Lens} lens */
export function lensReadout(lens) {
  const [place, value] = [make("span", "lab-place"), make("strong", "lab-value lab-lens-value")];
  return {
    root: make("div", "lab-readout", [place, value]),
    /** @param {{focus: number, locked: number, quantity: Quantity, state: number}} view */
    update({ focus, locked, quantity, state }) {
      const patch = focus >= 0 ? focus : locked;
      const name = patch < 0 ? "Point at a patch to read it; click to lock it." : patchName(lens.spec.map, patch);
      setText(place, patch >= 0 && patch === locked ? `${name} · locked` : name);
      setText(value, patch < 0 ? "" : valueText(lens, quantity, state, patch));
    },
  };
}

/** @param {HTMLElement} canvas @param {import("./shared/grid.js").PictureMap} map @param {LockHost} host
 * @param {AbortSignal} signal */
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
    if (event.key in ARROWS) go(ARROWS[event.key]);
    else if ((event.key === " " || event.key === "Enter") && cursor >= 0) host.lock(cursor === host.locked() ? -1 : cursor);
    else return;
    event.preventDefault();
  };
  canvas.addEventListener("keydown", press, { signal });
  canvas.addEventListener("pointerdown", () => (cursor = -1), { signal });
  canvas.addEventListener("blur", () => host.point({ cursor: -1 }), { signal });
  canvas.addEventListener("focus", () => host.point({ cursor }), { signal });
}

export const renderLens = shows(TokenLens);
