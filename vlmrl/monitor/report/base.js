"use strict";
// Shared by all parts of the page: data, DOM elements, number formats, colours, downloads.
// Texts come from models and tasks, so they become text nodes, never HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SEVERAL = RUNS.length > 1;

function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") made.className = value;
    else if (key === "on") for (const [event, run] of Object.entries(value)) made.addEventListener(event, run);
    else if (key === "style") for (const [name, of] of Object.entries(value)) made.style.setProperty(name, of);
    else if (key === "data") Object.assign(made.dataset, value);
    else if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────

const MINUS = "\u2212";
const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);

const fmt = {
  // Four significant digits. Very small and very large numbers have an exponent.
  number(value, digits = 4) {
    if (!known(value)) return "–";
    if (typeof value !== "number") return String(value);
    if (value === 0) return "0";
    const size = Math.abs(value);
    let text;
    if (size < 1e-3 || size >= 1e7) {
      const [mantissa, exponent] = value.toExponential(Math.max(0, digits - 3)).split("e");
      text = `${mantissa}e${Number(exponent)}`;
    } else if (Number.isInteger(value)) text = value.toLocaleString("en");
    else if (size >= 10 ** (digits - 1)) text = Math.round(value).toLocaleString("en");
    else text = Number(value.toPrecision(digits)).toString();
    return text.replaceAll("-", MINUS);
  },
  signed: (value) => (known(value) && value > 0 ? "+" : "") + fmt.number(value, 3),
  count: (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–"),
  percent: (value) => (known(value) ? `${fmt.number(100 * value, 3)} %` : "–"),
  gib: (value) => (known(value) ? `${(value / 2 ** 30).toFixed(2)} GiB` : "–"),
  seconds(value) {
    if (!known(value)) return "–";
    if (value < 1) return `${fmt.number(value * 1000, 3)} ms`;
    if (value < 60) return `${fmt.number(value, 3)} s`;
    const minutes = Math.floor(value / 60);
    if (minutes < 60) return `${minutes} min ${Math.round(value % 60)} s`;
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  },
  value(value) {
    if (value === null || value === undefined) return "none";
    if (typeof value === "number" && !Number.isInteger(value)) return String(value);
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  },
};

const lastOf = (values) => (values ? values.findLast(known) : undefined);
// train, or how a held-out rollout was decoded; those of a named set have the split `eval_<set>_sampled`.
const splitOf = (rollout) => (rollout.split === "train" ? "train" : rollout.split.endsWith("_greedy") ? "eval_greedy" : "eval_sampled");

const firstOf = (values) => (values ? values.find(known) : undefined);

// The value below which `share` of the numbers lie. NaNs are ignored.
function quantile(values, share) {
  const sorted = Float64Array.from(values.filter((value) => !Number.isNaN(value))).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : NaN;
}

// ── packed arrays ───────────────────────────────────────────────────────────────────────────────────────────

// Decode base64 of little-endian numbers. Every machine that runs a browser is little-endian.
function unpack(text, Type) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return new Type(bytes.buffer);
}

for (const [index, run] of RUNS.entries()) {
  run.index = index;
  // Decoded on first use, so that the curves appear first.
  let tokens;
  Object.defineProperty(run, "columns", {
    get() {
      return (tokens ??= {
        ids: unpack(run.tokens.ids, Int32Array),
        versions: unpack(run.tokens.versions, Int32Array),
        engine: unpack(run.tokens.engine, Float32Array),
        trainer: unpack(run.tokens.trainer, Float32Array),
        entropy: unpack(run.tokens.entropy, Float32Array),
        prompts: unpack(run.prompt_ids, Int32Array),
      });
    },
  });
}

const NAMES = RUNS.map((run) => run.name);

// ── colours ─────────────────────────────────────────────────────────────────────────────────────────────────

const PALETTE = 8;
const paletteName = (index) => `--c${index % PALETTE}`;

// One colour per name on the whole page: names that stand in one chart have different ones, as far as the palette goes.
const NAMED = new Map([["training", 0], ["sampled", 1], ["greedy", 2]]);

// The palette names of `names`, which stand in one chart; `taken` are other names in it.
function coloursOf(names, taken = []) {
  const used = new Set([...names, ...taken].filter((name) => NAMED.has(name)).map((name) => NAMED.get(name)));
  // The colours of training, sampled and greedy come last.
  const first = NAMED.size;
  return names.map((name, place) => {
    if (!NAMED.has(name)) {
      const order = [...Array(PALETTE).keys()].map((i) => (i < 5 ? 3 + ((first + place + i) % 5) : i - 5));
      const index = order.find((each) => !used.has(each)) ?? order[0];
      NAMED.set(name, index);
      used.add(index);
    }
    return paletteName(NAMED.get(name));
  });
}

// The value of a CSS colour property, as a canvas needs it.
function colour(name) {
  const probe = el("span", { style: { color: `var(${name})`, display: "none" } });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const faded = (rgb, alpha) => rgb.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);

const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function remember(key, value) {
  try {
    localStorage.setItem(`vlmrl.${key}`, value);
  } catch {
    // A browser may forbid storage to a local file.
  }
}

function recall(key) {
  try {
    return localStorage.getItem(`vlmrl.${key}`);
  } catch {
    return null;
  }
}

function toggleTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  remember("theme", document.documentElement.dataset.theme);
}

// ── files ───────────────────────────────────────────────────────────────────────────────────────────────────

function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function csv(columns) {
  const keys = Object.keys(columns);
  const cell = (value) => (known(value) ? String(value) : "");
  const rows = columns[keys[0]].map((_, row) => keys.map((key) => cell(columns[key][row])).join(","));
  return [keys.map((key) => JSON.stringify(key)).join(","), ...rows].join("\n") + "\n";
}

const button = (label, title, run, options = {}) =>
  el("button", { type: "button", title, on: { click: run }, ...options }, label);

// A group of buttons of which exactly one is chosen.
function segmented(label, choices, chosen, changed) {
  const box = el("div", { class: "segmented", role: "radiogroup", "aria-label": label });
  const set = (value, focus) => {
    for (const each of box.children) {
      const on = each.dataset.value === value;
      each.setAttribute("aria-checked", on);
      each.tabIndex = on ? 0 : -1;
      if (on && focus) each.focus();
    }
  };
  const choose = (value, focus) => {
    set(value, focus);
    changed(value);
  };
  for (const [value, text, title] of choices) {
    box.append(
      button(text, title, () => choose(value), { role: "radio", data: { value } }),
    );
  }
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const at = choices.findIndex(([value]) => value === document.activeElement.dataset.value);
    choose(choices[(at + step + choices.length) % choices.length][0], true);
  });
  set(chosen);
  box.choose = choose;
  return box;
}
