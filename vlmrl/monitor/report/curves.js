"use strict";
// The curves, drawn by uPlot. The legends of all charts show the values under the shared cursor.

const GROUP = "step"; // the name of the shared cursor
const charts = [];

// [title, unit, [[key, label], …], options]. A chart is left out if no run has any of its keys.
const CHARTS = [
  ["Reward", "", [
    ["reward/mean", "training"],
    ["eval/reward", "held-out, sampled"],
    ["eval/reward_greedy", "held-out, greedy"],
  ], { wide: true, points: 1, target: "orchestrator.eval.target" }],
  ["Mismatch of engine and trainer", "nats", [["mismatch_kl/mean", "mean"], ["mismatch_kl/max", "max"]], { log: true }],
  ["Vision gap", "nats per token", [["vision_gap/blank", "with grey images"], ["vision_gap/shuffled", "with other images"]],
    { spans: true }],
  ["Entropy", "nats per token", [["entropy", "mean"]]],
  ["Time per step", "s", [
    ["time/rollout", "rollout"],
    ["time/train", "train"],
    ["time/sync", "sync"],
    ["time/other", "other"],
  ], { stacked: true }],
  ["Throughput", "tokens / s", [["throughput/tokens_per_s", "prompts and completions"]]],
  ["Memory", "GiB", [["memory/peak_bytes", "peak"]], { scale: 2 ** -30 }],
  ["Staleness", "optimizer steps", [["staleness/mean", "mean"], ["staleness/max", "max"]]],
  ["Loss", "", [["loss", "loss"]]],
  ["Gradient norm", "", [["grad_norm", "before clipping"]]],
  ["Stop reasons", "rollouts", "rollouts/stop/", { stacked: true }],
  ["Dropped rollouts", "rollouts", "rollouts/dropped/", { stacked: true }],
  ["Groups without a gradient", "share of groups", [["groups/zero_advantage", "all advantages 0"]]],
];

const REST = new Set(["step", "policy_version"]);

function prepare(run) {
  const m = run.metrics;
  if (m["time/step"]) {
    m["time/other"] = m["time/step"].map((whole, i) =>
      known(whole) ? Math.max(0, whole - m["time/rollout"][i] - m["time/train"][i] - m["time/sync"][i]) : null,
    );
    const share = Math.max(...m["time/other"].map((value, i) => (known(value) ? value / m["time/step"][i] : 0)));
    if (share < 0.01) delete m["time/other"];
  }
  // Where a step has no rollout of a kind, it has no key: draw 0.
  for (const prefix of ["rollouts/stop/", "rollouts/dropped/"]) {
    for (const key of Object.keys(m).filter((key) => key.startsWith(prefix))) {
      m[key] = m[key].map((value, i) => (known(m["rollouts/total"]?.[i]) ? (value ?? 0) : null));
    }
  }
}

const keysOf = (wanted) => {
  if (typeof wanted !== "string") return wanted.filter(([key]) => RUNS.some((run) => run.metrics[key]?.some(known)));
  const found = new Set(RUNS.flatMap((run) => Object.keys(run.metrics).filter((key) => key.startsWith(wanted))));
  const most = (key) => Math.max(...RUNS.map((run) => lastOf(run.metrics[key]) ?? 0));
  return [...found].sort((a, b) => most(b) - most(a) || a.localeCompare(b)).map((key) => [key, key.slice(wanted.length)]);
};

// One chart: its header, legend and plot. Returns null where no run has any of the keys.
function chart(title, unit, keys, options = {}) {
  const source = options.source ?? "metrics";
  const { stacked = false, log = false, scale = 1 } = options;
  const holders = RUNS.filter((run) => keys.some(([key]) => run[source][key]?.some(known)));
  if (!holders.length) return null;
  const lines = linesOf(holders, keys, source, options.colour ?? 0);
  const raw = tableOf(holders, lines, source, (value) => (known(value) ? value * scale : null));
  const stacks = stacked && !SEVERAL;
  const drawn = stacks ? stack(raw) : log ? logarithms(raw) : raw;

  let plot = null;
  const values = lines.map(() => el("b"));
  const at = el("span", { class: "at" });
  const canvas = el("div", { class: "plot", tabindex: "0", role: "img",
    "aria-label": `${title}: left and right arrow keys move the cursor` });
  const box = el("article", { class: `chart${options.wide ? " wide" : ""}`, data: { title } },
    el("header", {}, el("h3", {}, title), unit && el("small", {}, unit), at,
      button("CSV", `Download the values of “${title}”`, () => saveChart(title, holders, lines, source), { class: "quiet" })),
    legendOf(lines, values, (index, show) => plot?.setSeries(index + 1, { show })), canvas);

  const read = () => {
    const index = plot?.cursor.idx;
    const over = known(index) && plot.cursor.left >= 0;
    at.textContent = over ? `step ${fmt.count(raw[0][index])}` : "";
    values.forEach((value, i) => {
      // A metric that few steps have (an evaluation) shows its newest value up to the cursor.
      const upTo = over ? raw[i + 1].slice(0, index + 1) : raw[i + 1];
      const shown = over && !lines[i].few ? raw[i + 1][index] : lastOf(upTo);
      value.textContent = fmt.number(shown);
    });
  };
  const draw = () => {
    const shown = plot ? plot.series.map((series) => series.show) : null;
    plot?.destroy();
    plot = null;
    if (!canvas.clientWidth) return; // hidden: drawn once it is visible
    const fewSteps = raw[0].length < 3;
    plot = new uPlot(plotOptions(canvas.clientWidth, lines, { ...options, log, stacks, fewSteps }, shown, read), drawn, canvas);
    read();
  };

  canvas.addEventListener("keydown", (event) => moveCursor(event, plot, raw[0]));
  canvas.addEventListener("blur", () => plot?.setCursor({ left: -10, top: -10 }));
  new ResizeObserver(() => {
    if (!plot) draw();
    else if (plot.width !== canvas.clientWidth && canvas.clientWidth) {
      plot.setSize({ width: canvas.clientWidth, height: plot.height });
    }
  }).observe(canvas);
  charts.push(draw);
  return box;
}

// The lines of a chart. With several runs, each run has a colour and each key a dash pattern.
function linesOf(holders, keys, source, firstColour) {
  return holders.flatMap((run) =>
    keys.filter(([key]) => run[source][key]?.some(known)).map(([key, label], place) => ({
      run, key, label, place,
      name: SEVERAL ? (keys.length > 1 ? `${NAMES[run.index]} · ${label}` : NAMES[run.index]) : label,
      few: sparse(run[source][key]),
      colour: paletteName(SEVERAL ? run.index : firstColour + place),
    })),
  );
}

// [steps, values of each line]; the steps of several runs are joined.
function tableOf(holders, lines, source, shape) {
  const tables = holders.map((run) => [
    run[source].step,
    ...lines.filter((line) => line.run === run).map((line) => run[source][line.key].map(shape)),
  ]);
  return tables.length > 1 ? uPlot.join(tables) : tables[0];
}

function saveChart(title, holders, lines, source) {
  const table = tableOf(holders, lines, source, (value) => value);
  const columns = { step: table[0] };
  lines.forEach((line, i) => (columns[SEVERAL ? `${NAMES[line.run.index]}:${line.key}` : line.key] = table[i + 1]));
  download(`${title.replaceAll(/\W+/g, "_").toLowerCase()}.csv`, csv(columns), "text/csv");
}

// The legend: a button per line that shows or hides it, with the elements `values` inside.
function legendOf(lines, values, setShown) {
  return el("ul", { class: "legend" }, lines.map((line, i) => {
    const mark = el("i", { style: { background: `var(${line.colour})` }, class: line.place && SEVERAL ? "dash" : "" });
    const item = button([mark, el("span", {}, line.name), values[i]], `Show or hide ${line.name}`, () => {
      const on = item.getAttribute("aria-pressed") !== "true";
      item.setAttribute("aria-pressed", on);
      setShown(i, on);
    }, { "aria-pressed": "true" });
    return el("li", {}, item);
  }));
}

// uPlot's options. `shown` says which series are visible (null: all); `read` runs when the cursor moves.
function plotOptions(width, lines, { log, stacks, fewSteps, spans, target: targetKey }, shown, read) {
  const [ink, grid, surface] = [colour("--muted"), colour("--line"), colour("--surface")];
  const font = `11px ${getComputedStyle(document.body).fontFamily}`;
  return {
    width,
    height: 190,
    padding: [10, 14, 0, 0],
    legend: { show: false },
    cursor: {
      sync: { key: GROUP, setSeries: false },
      drag: { x: true, y: false },
      points: { size: 7, width: 2, fill: surface },
    },
    scales: { x: { time: false }, y: { range: (u, low, high) => (log ? decades(low, high) : margins(low, high, stacks)) } },
    axes: axesOf({ stroke: ink, font, grid: { stroke: grid, width: 1 }, ticks: { show: false }, gap: 6 }, log),
    series: [{}, ...lines.map((line, i) => {
      const stroke = colour(line.colour);
      return {
        stroke,
        width: 1.6,
        fill: stacks ? faded(stroke, 0.28) : undefined,
        dash: SEVERAL && line.place ? [[5, 4], [1.5, 3]][(line.place - 1) % 2] : undefined,
        spanGaps: SEVERAL || line.few || spans,
        points: { show: line.few || fewSteps, size: 6, fill: surface, stroke, width: 1.6 },
        show: shown ? shown[i + 1] : true,
      };
    })],
    bands: stacks ? lines.slice(1).map((_, i) => ({ series: [i + 2, i + 1] })) : undefined,
    hooks: {
      setCursor: [read],
      draw: [(u) => target(u, targetKey, ink)],
    },
  };
}

function axesOf(axis, log) {
  return [
    { ...axis, grid: { show: false }, size: 26, values: (u, splits) => splits.map((v) => (Number.isInteger(v) ? fmt.count(v) : "")) },
    {
      ...axis,
      values: (u, splits) => splits.map((v) => fmt.number(log ? 10 ** v : v, 3)),
      size: (u, texts, index, cycle) => {
        if (cycle > 1) return u.axes[index]._size;
        u.ctx.font = axis.font;
        const widest = Math.max(0, ...(texts ?? []).map((text) => u.ctx.measureText(text).width));
        return Math.ceil(widest) + 12;
      },
      space: 34,
      ...(log ? { incrs: [1, 2, 3, 5, 10, 20, 50, 100] } : {}),
    },
  ];
}

// Arrow keys, Home, End and Page keys move the cursor over the steps.
function moveCursor(event, plot, steps) {
  const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, PageUp: -10, PageDown: 10 }[event.key];
  if (!by || !plot) return;
  event.preventDefault();
  event.stopPropagation();
  const from = plot.cursor.left >= 0 ? plot.cursor.idx : (by > 0 ? -1 : steps.length);
  const index = Math.max(0, Math.min(steps.length - 1, from + by));
  plot.setCursor({ left: plot.valToPos(steps[index], "x"), top: 20 });
}

const sparse = (values) => values.filter(known).length < values.length / 2;

// Logarithmic values are drawn as exponents on a linear axis. uPlot's own logarithmic axis takes seconds if the values
// span many decades, and a mismatch ranges from 1e-40 to 1.
const logarithms = (raw) => [raw[0], ...raw.slice(1).map((values) =>
  values.map((value) => (known(value) && value > 0 ? Math.log10(value) : null)))];

function decades(low, high) {
  if (low === null || high === null) return [-1, 0];
  return [Math.floor(low), Math.max(Math.ceil(high), Math.floor(low) + 1)];
}

function margins(low, high, fromZero) {
  if (low === null || high === null) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [Math.min(0, low * 1.2), Math.max(0, low * 1.2)];
  const room = 0.06 * (high - low);
  const near = low >= 0 && low < 0.5 * high;
  return [fromZero || near ? 0 : low - room, high + room];
}

// Stack each series on top of the ones before it.
function stack(raw) {
  const sums = raw[0].map(() => 0);
  return [raw[0], ...raw.slice(1).map((values) => values.map((value, i) => (known(value) ? (sums[i] += value) : null)))];
}

// Draw a line at the reward that ends the run (orchestrator.eval.target), if it is set.
function target(u, key, ink) {
  const value = key && RUNS[0].config[key];
  if (!known(value) || value > u.scales.y.max) return;
  const [y, left, right] = [u.valToPos(value, "y", true), u.bbox.left, u.bbox.left + u.bbox.width];
  u.ctx.save();
  u.ctx.strokeStyle = ink;
  u.ctx.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
  u.ctx.beginPath();
  u.ctx.moveTo(left, y);
  u.ctx.lineTo(right, y);
  u.ctx.stroke();
  u.ctx.restore();
}

// ── the view ────────────────────────────────────────────────────────────────────────────────────────────────

const STATES = {
  finished: ["finished", "good"],
  target_reached: ["target reached", "good"],
  interrupted: ["interrupted", "fair"],
  error: ["ended with an error", "bad"],
};
const stateOf = (run) => STATES[run.state] ?? (run.state ? [run.state, "fair"] : ["not ended: running or killed", "fair"]);

const worstMismatch = (run) => run.metrics["mismatch_kl/max"]?.filter(known).reduce((a, b) => Math.max(a, b), 0);

function tile(label, value, note) {
  return el("div", { class: "tile" }, el("span", {}, label), el("b", {}, value), note && el("small", {}, note));
}

function tiles(run) {
  const m = run.metrics;
  const change = (key) => {
    const [first, last] = [firstOf(m[key]), lastOf(m[key])];
    return known(first) && first !== last ? `from ${fmt.number(first, 3)}` : "";
  };
  const shown = [
    ["held-out reward, sampled", fmt.number(lastOf(m["eval/reward"]), 3), change("eval/reward")],
    ["held-out reward, greedy", fmt.number(lastOf(m["eval/reward_greedy"]), 3), change("eval/reward_greedy")],
    ["training reward", fmt.number(lastOf(m["reward/mean"]), 3), change("reward/mean")],
    ["optimizer steps", fmt.count(lastOf(m.step)), `of at most ${fmt.count(run.config["trainer.max_steps"])}`],
    ["wall-clock time", fmt.seconds(run.summary?.wall_clock_s ?? lastOf(m["time/elapsed"])),
      known(lastOf(m["time/step"])) ? `median step ${fmt.seconds(quantile(m["time/step"].filter(known), 0.5))}` : ""],
    ["largest mismatch", fmt.number(worstMismatch(run), 3), "nats, of one token"],
    ["vision gap", fmt.number(lastOf(m["vision_gap/blank"]), 3), "nats per token, with grey images"],
    ["throughput", fmt.count(lastOf(m["throughput/tokens_per_s"])), "tokens / s"],
  ];
  return el("div", { class: "tiles" }, shown.filter(([, value]) => value !== "–").map((each) => tile(...each)));
}

function runHead(run) {
  const [state, kind] = stateOf(run);
  const c = run.config;
  const facts = [c["model.name"], String(c["task.target"]).split(":").at(-1), c["algorithm.loss"], `seed ${c.seed}`];
  return el("div", { class: "run" },
    el("div", { class: "runline" },
      el("h2", {}, NAMES[run.index]),
      el("span", { class: `pill ${kind}`, data: { state: run.state ?? "" } }, state),
      el("span", { class: "muted" }, facts.join(" · ")),
      el("span", { class: "muted push", title: run.path }, `updated ${run.updated}`),
      button("metrics.csv", "Download all metrics of all steps", () => download(`${run.name}_metrics.csv`, csv(run.metrics), "text/csv"),
        { class: "quiet" }),
      Object.keys(run.supervised).length > 0 && button("supervised.csv", "Download all metrics of all supervised steps",
        () => download(`${run.name}_supervised.csv`, csv(run.supervised), "text/csv"), { class: "quiet" })),
    run.summary?.error && el("p", { class: "note bad" }, run.summary.error),
    (run.summary?.warnings ?? []).map((text) => el("p", { class: "note fair" }, text)),
    tiles(run),
    run.doctor && el("table", { class: "doctor" }, el("tbody", {}, run.doctor.map((line) =>
      el("tr", {}, el("th", { scope: "row" }, line.name), el("td", { class: line.verdict === "ok" ? "good" : "" }, line.verdict),
        el("td", {}, line.says))))));
}

// The summary of several runs: one row per run.
function runTable(runs) {
  const titles = ["held-out", "greedy", "training", "steps", "wall-clock time", "median step", "largest mismatch", "tokens / s"];
  return el("div", { class: "tablebox" }, el("table", { class: "runs" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "run"), el("th", {}), titles.map((title) => el("th", { scope: "col" }, title)), el("th", {}))),
    el("tbody", {}, runs.map((run) => {
      const [m, [state, kind]] = [run.metrics, stateOf(run)];
      const values = [
        fmt.number(lastOf(m["eval/reward"]), 3), fmt.number(lastOf(m["eval/reward_greedy"]), 3), fmt.number(lastOf(m["reward/mean"]), 3),
        fmt.count(lastOf(m.step)), fmt.seconds(run.summary?.wall_clock_s ?? lastOf(m["time/elapsed"])),
        fmt.seconds(quantile((m["time/step"] ?? []).filter(known), 0.5)), fmt.number(worstMismatch(run), 2),
        fmt.count(lastOf(m["throughput/tokens_per_s"])),
      ];
      return el("tr", { title: run.path },
        el("th", { scope: "row" }, el("i", { class: "dot", style: { background: `var(${paletteName(run.index)})` } }), NAMES[run.index]),
        el("td", {}, el("span", { class: `pill ${kind}`, data: { state: run.state ?? "" } }, state)),
        values.map((value) => el("td", {}, value)),
        el("td", {}, button("CSV", "Download all metrics of all steps", () => download(`${run.name}_metrics.csv`, csv(run.metrics), "text/csv"), { class: "quiet" })));
    }))));
}

function buildCurves(section) {
  const grid = el("div", { class: "charts" });
  const used = new Set(REST);
  // The table and the CSV files use the run's own metrics, without time/other, which is computed here.
  const files = RUNS.map((run) => ({ ...run, metrics: { ...run.metrics } }));
  section.append(...(SEVERAL ? [runTable(files)] : files.map(runHead)),
    el("p", { class: "muted caption" }, "The x axis is optimizer steps. Drag to zoom in, double-click to zoom out."), grid);
  RUNS.forEach(prepare);
  for (const [title, unit, wanted, options = {}] of CHARTS) {
    const keys = keysOf(wanted);
    keys.forEach(([key]) => used.add(key));
    if (options.stacked && SEVERAL) {
      for (const [key, label] of keys) grid.append(chart(`${title}: ${label}`, unit, [[key, label]]) ?? "");
    } else grid.append(chart(title, unit, keys, options) ?? "");
  }
  grid.append(chart("Warm-up loss", "nats per token", [["loss", "supervised"]], { source: "supervised", colour: 3 }) ?? "");
  if (!grid.children.length) grid.replaceWith(el("p", { class: "empty" }, "No metrics yet: metrics.jsonl is empty."));

  const others = [...new Set(RUNS.flatMap((run) => Object.keys(run.metrics)))].filter((key) => !used.has(key)).sort();
  if (!others.length) return;
  const more = el("div", { class: "charts" });
  const find = el("input", { type: "search", placeholder: "Filter by name", "aria-label": "Filter metrics by name" });
  const apply = () => {
    for (const box of more.children) box.hidden = !box.dataset.title.includes(find.value.trim());
  };
  find.addEventListener("input", apply);
  const details = el("details", { class: "more" },
    el("summary", {}, `${others.length} more metrics`), find, more);
  details.addEventListener("toggle", () => {
    if (more.children.length) return;
    for (const key of others) more.append(chart(key, "", [[key, key.split("/").at(-1)]]) ?? "");
    apply();
  });
  section.append(details);
}

