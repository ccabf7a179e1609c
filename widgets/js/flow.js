// @ts-check
/**
 * FlowView: the two plots with what stands around them (flows to put on and off, the scale of the shares, the answers
 * side by side, the line that says what is pointed at), what is chosen in them, and what Python hears of it.
 */

import { blankCanvas, contextOf } from "./shared/canvas.js";
import { carded, choices, make, segmented, setText } from "./shared/dom.js";
import { bytesOf, readPalette } from "./shared/maps.js";
import { Panel, shows } from "./shared/panel.js";
import { Plot } from "./shared/plot.js";
import { cellsOf, curvesOf, cutSentence, flowText, nextSpot, patchSentence, reachOf, readFlow, scoreText } from "./flow_data.js";
import { cellFrame, cellsHeight, frameOf, nearestMark, paintCells, paintCurves, shareColor, spotAt } from "./flow_plots.js";

/**
 * @import { FlowSpec, GridSpec, Spot, SweepSpec } from "./flow_data.js"
 */

const CURVES_HEIGHT = 322;
const CUT =
  "Each mark: one flow of attention is cut in a window of layers, everything else stays, and the same words are scored again.";
const PATCHED = "Each cell: the states of the clean run at one place are put into the run with the corrupted picture.";
const CURVES_HELP = "Left and right move over layers, up and down over flows, Escape leaves.";
const CELLS_HELP = "Arrow keys move over layers and places, Escape leaves.";
const COMPONENTS = /** @type {Record<string, string>} */ ({ residual: "Residual", attention: "Attention", mlp: "MLP" });

class FlowView extends Panel {
  /** @param {import("./shared/panel.js").Model} model @param {HTMLElement} el */
  constructor(model, el) {
    super(model, ["target", "component"]);
    this.spec = /** @type {FlowSpec} */ (model.get("spec"));
    this.data = readFlow(model.get("data"), this.spec);
    this.colors = readPalette(this.spec.diverging);
    this.own = { relative: false, open: (this.spec.sweep?.flows ?? []).map(() => true) };
    this.over = { flow: /** @type {Spot | null} */ (null), cell: /** @type {Spot | null} */ (null) };
    this.painters = /** @type {(() => void)[]} */ ([]);
    this.picture = URL.createObjectURL(new Blob([bytesOf(model.get("picture")).slice()], { type: this.spec.picture }));
    this.open(this.build(), el);
  }

  build() {
    const { spec } = this;
    const halves = [spec.sweep && this.sweepHalf(), spec.grid && this.gridHalf()].filter((half) => half instanceof Node);
    const body = make("div", `lab-flow-body${halves.length < 2 ? " lab-flow-one" : ""}`, halves);
    const notes = [...new Set([...(spec.sweep?.notes ?? []), ...(spec.grid?.notes ?? [])])];
    const list = make("ul", "lab-notes", notes.map((text) => make("li", "", [text])));
    const all = [make("div", "lab-head", [make("span", "lab-about", [`${spec.model} · seed ${spec.seed}`])]), this.top()];
    all.push(this.targets(), body, list, this.live);
    return carded("lab-widget lab-flow", "Flow of information", all);
  }

  top() {
    const { question, answer } = this.spec;
    const image = make("img", "lab-flow-picture", [], { alt: "The picture asked about", src: this.picture });
    const asked = make("div", "lab-question", [question], { role: "heading", "aria-level": "2" });
    const said = make("div", "lab-flow-said", ["It answered: ", make("strong", "", [answer])]);
    return make("div", "lab-flow-top", [image, make("div", "", [asked, said])]);
  }

  targets() {
    const { chips } = this.spec;
    const items = chips.map(({ text, kind }) => ({ name: text, content: [kind === "answer" ? "whole answer" : text] }));
    const pick = (/** @type {number} */ i) => this.choose("target", i);
    const made = choices({ label: "What is scored", className: "lab-pills", items, pick, signal: this.stop.signal });
    this.painters.push(() => made.show(this.model.get("target"), this.model.get("target")));
    const root = make("div", "lab-bar-row lab-flow-targets", [make("span", "lab-label", ["What is scored"]), made.root]);
    root.hidden = chips.length < 2;
    return root;
  }

  sweepHalf() {
    const { signal } = this.stop;
    const sweep = /** @type {SweepSpec} */ (this.spec.sweep);
    const units = ["Log-probability", "Probability, %"];
    const unit = segmented("Unit", units, (i) => this.set(this.own, { relative: i === 1 }), signal);
    const toggles = flowToggles(sweep.flows, this.spec.colors, (i) => this.toggle(i), signal);
    const line = spotLine("Point at a mark to read it; click to keep it.");
    const host = {
      find: (/** @type {number} */ x, /** @type {number} */ y) => {
        const view = this.curveView();
        return view && nearestMark(view, frameOf(view, plot.width, CURVES_HEIGHT), x, y);
      },
      next: (/** @type {string} */ key) => nextSpot(key, this.kept("flow"), this.own.open, sweep.windows.length),
      ...this.pointer("flow"),
      height: () => CURVES_HEIGHT,
    };
    const name = `Change of the score when a flow is cut, ${sweep.flows.length} flows by ${sweep.windows.length} windows. `;
    const plot = new Plot("lab-flow-curves", name + CURVES_HELP, host, signal);
    this.painters.push(() => {
      const view = this.curveView();
      const { plain } = this.spec.chips[this.target];
      unit.root.hidden = !plain || !view;
      unit.show(Number(this.own.relative && plain), -1);
      toggles.update(this.own.open);
      const sheet = plot.sheet();
      if (view) paintCurves(sheet, view, this.over.flow, this.kept("flow"));
      line.update(view ? this.saidFlow(this.over.flow ?? this.kept("flow")) : this.missing("swept"));
    });
    const title = make("h3", "lab-flow-title", ["What cutting costs"]);
    const controls = make("div", "lab-flow-controls lab-bar-row", [unit.root]);
    const parts = [title, make("p", "lab-flow-how", [CUT]), controls, plot.canvas, line.root, toggles.root];
    return make("section", "lab-flow-half", parts);
  }

  gridHalf() {
    const { signal } = this.stop;
    const grid = /** @type {GridSpec} */ (this.spec.grid);
    const [tall, wide] = [grid.sites.length, grid.windows.length];
    const names = grid.components.map((one) => COMPONENTS[one] ?? one);
    const component = segmented("Component", names, (i) => this.choose("component", i), signal);
    component.root.hidden = names.length < 2;
    const open = grid.sites.map(() => true);
    const line = spotLine("Point at a cell to read it; click to keep it.");
    const [scale, cards] = [shareScale(this.colors), answerCards(grid)];
    const host = {
      find: (/** @type {number} */ x, /** @type {number} */ y) => spotAt(cellFrame(tall, wide, plot.width), x, y),
      next: (/** @type {string} */ key) => nextSpot(key, this.kept("cell"), open, wide),
      ...this.pointer("cell"),
      height: (/** @type {number} */ width) => cellsHeight(tall, wide, width),
    };
    const name = `Share brought back, ${tall} places by ${wide} windows of layers. ${CELLS_HELP}`;
    const plot = new Plot("lab-flow-cells", name, host, signal);
    this.painters.push(() => {
      const at = this.model.get("component");
      component.show(at, -1);
      const cells = cellsOf(this.spec, this.data, this.target, at);
      const sheet = plot.sheet();
      const spot = this.over.cell ?? this.kept("cell");
      if (cells) {
        const { sites, windows } = grid;
        const shown = { rows: cells.rows, sites, windows, colors: this.colors, floor: cells.floor };
        paintCells(sheet, shown, this.over.cell, this.kept("cell"));
        scale.update(Math.min(...cells.rows.flat().filter(Number.isFinite), 0), reachOf(cells.rows));
      }
      cards.update(at, spot, cells && spot ? cells.rows[spot[0]][spot[1]] : NaN);
      line.update(cells ? this.saidCell(spot) : this.missing("patched"));
    });
    const title = make("h3", "lab-flow-title", ["What patching brings back"]);
    const controls = make("div", "lab-flow-controls lab-bar-row", [component.root]);
    const parts = [title, make("p", "lab-flow-how", [PATCHED]), controls, plot.canvas, scale.root, line.root, cards.root];
    return make("section", "lab-flow-half", parts);
  }

  /** What both plots do with the pointer. @param {"flow" | "cell"} name */
  pointer(name) {
    return {
      hover: (/** @type {Spot | null} */ spot) => {
        if (String(spot) !== String(this.over[name])) this.set(this.over, { [name]: spot });
      },
      pick: (/** @type {Spot | null} */ spot) => this.pick(name, spot),
      changed: this.refresh,
    };
  }

  /** @param {"flow" | "cell"} name @param {Spot | null} spot */
  pick(name, spot) {
    const { [name]: _, ...rest } = this.model.get("selected");
    this.over[name] = null;
    this.keep("selected", spot ? { ...rest, [name]: spot } : rest);
    this.say(name === "flow" ? this.saidFlow(spot) : this.saidCell(spot));
  }

  /** @param {string} name @param {number} value */
  choose(name, value) {
    this.keep(name, value);
    this.say([this.saidFlow(this.kept("flow")), this.saidCell(this.kept("cell"))].filter(Boolean).join(" "));
  }

  /** @param {number} flow */
  toggle(flow) {
    const open = this.own.open.map((on, i) => (i === flow ? !on : on));
    this.over.flow = null;
    this.set(this.own, { open });
  }

  get target() {
    return /** @type {number} */ (this.model.get("target"));
  }

  /** @param {"flow" | "cell"} name @returns {Spot | null} */
  kept(name) {
    const spot = this.model.get("selected")[name] ?? null;
    return spot && (name === "cell" || this.own.open[spot[0]]) ? spot : null;
  }

  curveView() {
    const { sweep, chips, colors } = this.spec;
    const { plain, what } = chips[this.target];
    const relative = this.own.relative && plain;
    const curves = curvesOf(this.spec, this.data, this.target, relative);
    if (!sweep || !curves) return null;
    const title = relative ? `change of the probability, % of what it was` : `change of ${what}${plain ? ", nats" : ", logits"}`;
    const { centres, windows } = sweep;
    const [names, unit] = [sweep.flows.map(flowText), relative ? "%" : ""];
    return { rows: curves.rows, open: this.own.open, names, centres, windows, title, unit, colors, floor: curves.floor };
  }

  /** @param {Spot | null} spot */
  saidFlow(spot) {
    const curves = curvesOf(this.spec, this.data, this.target, false);
    return spot && curves ? cutSentence(this.spec, curves, spot, this.target) : "";
  }

  /** @param {Spot | null} spot */
  saidCell(spot) {
    const at = this.model.get("component");
    const cells = cellsOf(this.spec, this.data, this.target, at);
    return spot && cells ? patchSentence(this.spec, cells, spot, this.target, at) : "";
  }

  /** @param {string} done */
  missing(done) {
    return `“${this.spec.chips[this.target].text}” was not ${done}: choose another target above.`;
  }

  paint() {
    for (const painter of this.painters) painter();
  }

  close() {
    super.close();
    URL.revokeObjectURL(this.picture);
  }
}

/** @param {string[]} flows @param {string[]} colors @param {(flow: number) => void} toggle @param {AbortSignal} signal */
export function flowToggles(flows, colors, toggle, signal) {
  const buttons = flows.map((name, i) => {
    const swatch = make("span", "lab-flow-swatch", [], { "aria-hidden": "true" });
    swatch.style.setProperty("--lab-flow-color", colors[i % colors.length]);
    const node = make("button", "lab-flow-toggle", [swatch, flowText(name)], { type: "button", "aria-pressed": "true" });
    node.addEventListener("click", () => toggle(i), { signal });
    return node;
  });
  return {
    root: make("div", "lab-pills", buttons, { role: "group", "aria-label": "Flows shown" }),
    update: (/** @type {boolean[]} */ open) => buttons.forEach((node, i) => node.setAttribute("aria-pressed", String(open[i]))),
  };
}

/** What is pointed at or chosen, in one sentence. @param {string} idle said while there is nothing */
export function spotLine(idle) {
  const root = make("p", "lab-flow-line");
  return {
    root,
    update(/** @type {string} */ text) {
      setText(root, text || idle);
      root.classList.toggle("lab-flow-idle", !text);
    },
  };
}

/** The colours with what zero and one mean.
 * @param {Uint8Array} colors */
export function shareScale(colors) {
  const strip = blankCanvas(256, 1);
  strip.className = "lab-strip";
  strip.setAttribute("aria-hidden", "true");
  const [zero, one] = [make("span", "lab-flow-tick", ["0 as corrupted"]), make("span", "lab-flow-tick", ["1 as clean"])];
  const root = make("div", "lab-flow-scale", [strip, zero, one]);
  let drawn = NaN;
  return {
    root,
    update(/** @type {number} */ least, /** @type {number} */ reach) {
      const key = least * 100 + reach;
      if (key === drawn) return;
      drawn = key;
      const lo = Math.min(0, least);
      const hi = Math.max(1, reach);
      const ctx = contextOf(strip);
      for (let i = 0; i < 256; i++) {
        ctx.fillStyle = `rgb(${shareColor(colors, lo + (i / 255) * (hi - lo), reach).join(", ")})`;
        ctx.fillRect(i, 0, 1, 1);
      }
      [zero, one].forEach((node, value) => (node.style.left = `${(100 * (value - lo)) / (hi - lo)}%`));
      one.classList.toggle("lab-flow-last", hi < 1.2);
      zero.classList.toggle("lab-flow-first", lo > -0.15 * hi);
    },
  };
}

/** The answer of the chosen cell between those of the two runs.
 * @param {GridSpec} grid */
export function answerCards(grid) {
  const given = [["clean run", grid.clean], ["this cell", ""], [`corrupted (${grid.corruption})`, grid.corrupt]];
  const cards = given.map(([name, said]) => {
    const strong = make("strong", "", [said]);
    const caption = make("span", "lab-caption", [name]);
    return { root: make("div", "lab-flow-answer", [caption, strong]), strong, caption };
  });
  cards[1].root.classList.add("lab-flow-now");
  const root = make("div", "lab-flow-answers", cards.map((card) => card.root), { role: "group", "aria-label": "Answers" });
  return {
    root,
    update(/** @type {number} */ component, /** @type {Spot | null} */ spot, /** @type {number} */ share) {
      const measured = spot !== null && grid.answers[component][spot[0]][spot[1]] !== "";
      setText(cards[1].strong, spot === null ? "–" : measured ? grid.answers[component][spot[0]][spot[1]] : "not measured");
      const back = Number.isFinite(share) ? ` · ${scoreText(share)} back` : "";
      setText(cards[1].caption, spot === null ? "click a cell" : `this cell${back}`);
    },
  };
}

export const renderFlow = shows(FlowView);
