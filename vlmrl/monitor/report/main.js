"use strict";
// Tabs, keyboard shortcuts, light and dark theme.

const VIEWS = { curves: ["Curves", buildCurves], rollouts: ["Rollouts", buildRollouts], config: ["Config", buildConfig] };
const built = new Set();
let drawnDark = null;

function openView(name, focus) {
  for (const [each, [, build]] of Object.entries(VIEWS)) {
    const [section, tab] = [document.getElementById(`view-${each}`), document.getElementById(`tab-${each}`)];
    const here = each === name;
    section.hidden = !here;
    tab.setAttribute("aria-selected", here);
    tab.tabIndex = here ? 0 : -1;
    if (here && focus) tab.focus();
    if (here && !built.has(each)) {
      built.add(each);
      build(section);
    }
  }
  document.body.dataset.view = name;
  silence();
  if (name === "curves") drawCurves();
  if (name === "rollouts") {
    mark();
    keepPlace();
  } else history.replaceState(null, "", `#${name}`);
}

// A canvas does not follow the theme by itself, and a hidden one cannot be drawn.
function drawCurves() {
  if (drawnDark === isDark()) return;
  drawnDark = isDark();
  charts.forEach((draw) => draw());
}

const KEYS = [
  ["1  2  3", "curves, rollouts, config"],
  ["t", "light or dark"],
  ["?", "this list"],
  ["j  k", "next and previous rollout"],
  ["J  K", "next and previous group"],
  ["g", "siblings side by side, or one rollout"],
  ["p", "play or pause the film of an episode"],
  [",  .", "one frame of the film back or on"],
  ["m", "prompts as messages, or token by token"],
  ["c", "colour tokens by the next value"],
  ["/", "search"],
  ["← →", "move the cursor of a chart, or the token of a completion"],
];

function nextTint() {
  const names = [...Object.keys(TINTS), ""];
  const box = view.legend.querySelector(".segmented");
  box.choose(names[(names.indexOf(state.tint) + 1) % names.length]);
}

const SHORTCUTS = {
  1: () => openView("curves", true),
  2: () => openView("rollouts", true),
  3: () => openView("config", true),
  t: switchTheme,
  "?": () => document.getElementById("help").showModal(),
};
const IN_ROLLOUTS = {
  j: () => move(1),
  k: () => move(-1),
  J: () => move(1, true),
  K: () => move(-1, true),
  ArrowRight: () => move(1),
  ArrowLeft: () => move(-1),
  ArrowDown: () => move(1, true),
  ArrowUp: () => move(-1, true),
  p: () => view.film?.toggle(),
  ",": () => view.film?.step(-1),
  ".": () => view.film?.step(1),
  g: () => flip("siblings"),
  m: () => flip("tokens"),
  c: nextTint,
  "/": () => view.search.focus(),
};

function switchTheme() {
  toggleTheme();
  if (document.body.dataset.view === "curves") drawCurves();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  if (event.target.closest("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const arrow = event.key.startsWith("Arrow");
  const inList = !arrow || event.target.closest(".groups") || event.target === document.body;
  const run = SHORTCUTS[event.key] ?? (document.body.dataset.view === "rollouts" && inList && IN_ROLLOUTS[event.key]);
  if (!run) return;
  event.preventDefault();
  run();
});

function begin() {
  const theme = recall("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  document.getElementById("who").append(
    el("span", { class: "brand" }, "vlmrl"),
    el("h1", { title: RUNS.map((run) => run.path).join("\n") }, SEVERAL ? `${RUNS.length} runs` : RUNS[0].name));
  const tabs = document.getElementById("tabs");
  for (const [name, [label]] of Object.entries(VIEWS)) {
    tabs.append(button(label, "", () => openView(name), { role: "tab", id: `tab-${name}`, "aria-controls": `view-${name}` }));
  }
  tabs.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const names = Object.keys(VIEWS);
    openView(names[(names.indexOf(document.body.dataset.view) + by + names.length) % names.length], true);
  });
  document.getElementById("tools").append(
    el("span", { class: "muted" }, `written ${DATA.generated}`),
    button("◐", "Light or dark (t)", switchTheme, { class: "icon", "aria-label": "Light or dark" }),
    button("?", "Keyboard (?)", () => document.getElementById("help").showModal(), { class: "icon", "aria-label": "Keyboard" }));
  document.getElementById("help").append(
    el("h2", {}, "Keyboard"),
    el("dl", {}, KEYS.map(([key, what]) => [el("dt", {}, key.split("  ").map((each) => el("kbd", {}, each))), el("dd", {}, what)])),
    el("form", { method: "dialog" }, el("button", {}, "Close")));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (document.body.dataset.view === "curves") drawCurves();
  });
  const named = location.hash.slice(1).split("?")[0];
  const hasCurves = RUNS.some((run) => Object.keys(run.metrics).length || Object.keys(run.supervised).length);
  openView(VIEWS[named] ? named : hasCurves || RUNS.every((run) => !run.rollouts.length) ? "curves" : "rollouts");
  // Two frames later everything is drawn.
  requestAnimationFrame(() => requestAnimationFrame(() => (document.documentElement.dataset.ready = Math.round(performance.now()))));
}

begin();
