// @ts-check
/**
 * A page without a kernel: stand-ins for the models of one or several views, and the links between them.
 * What is selected or pointed at in one view is selected or pointed at in all; so are the word and the method.
 */

/**
 * @typedef {import("./panel.js").Model} Model
 * @typedef {{model: Model, el: HTMLElement}} Host
 * @typedef {{entry: string, place: string, state: Record<string, any>, data: Record<string, string>}} StoredView
 * @typedef {{views: StoredView[], blobs: Record<string, string>}} Stored
 */

const TOGETHER = ["selected", "pointed", "method"];
const CHIPS = ["word", "target"]; // each view's name for what of the answer is explained

/** @param {Stored} stored @param {Record<string, (host: Host) => void>} entries */
export function openPage(stored, entries) {
  const bytes = (/** @type {string} */ text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const blobs = Object.fromEntries(Object.entries(stored.blobs).map(([name, text]) => [name, bytes(text)]));
  const models = stored.views.map(({ state, data }) =>
    standIn({ ...state, ...Object.fromEntries(Object.entries(data).map(([name, blob]) => [name, blobs[blob]])) }),
  );
  link(models);
  stored.views.forEach(({ entry, place }, i) => {
    const el = document.getElementById(place);
    if (el) entries[entry]({ model: models[i], el });
  });
}

/** A model with nobody behind it.
 * @param {Record<string, any>} values @returns {Model} */
export function standIn(values) {
  const heard = /** @type {Record<string, Set<() => void>>} */ ({});
  return {
    get: (name) => values[name],
    set(name, value) {
      if (JSON.stringify(values[name]) === JSON.stringify(value)) return;
      values[name] = value;
      for (const call of heard[`change:${name}`] ?? []) call();
    },
    save_changes() {},
    send() {},
    on: (name, call) => void (heard[name] ??= new Set()).add(call),
    off: (name, call) => void heard[name]?.delete(call),
  };
}

/** @param {Model[]} models */
export function link(models) {
  for (const from of models) {
    for (const name of [...TOGETHER, ...CHIPS]) {
      if (from.get(name) === undefined) continue;
      from.on(`change:${name}`, () => {
        for (const to of models) if (to !== from) follow(to, name, from);
      });
    }
  }
}

/** @param {Model} to @param {string} name @param {Model} from */
function follow(to, name, from) {
  const value = from.get(name);
  if (CHIPS.includes(name)) {
    const own = CHIPS.find((chip) => to.get(chip) !== undefined);
    const key = from.get("spec").chips[value].key;
    const place = to.get("spec").chips.findIndex((/** @type {{key: string}} */ chip) => chip.key === key);
    if (own && place >= 0) to.set(own, place);
  } else if (name === "method") {
    const known = (to.get("spec").methods ?? []).some((/** @type {{name: string}} */ method) => method.name === value);
    if (known) to.set("method", value);
  } else if (to.get(name) !== undefined) to.set(name, value);
}
