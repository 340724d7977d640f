"use strict";
// The view of the curves: the summary of each run, the charts that every run has, and the sections of sections.js.

// [title, unit, [[key, label], …], options]. A chart is left out if no run has any of its keys.
const CHARTS = [
  ["Reward", "", [
    ["reward/mean", "training", named("training")],
    ["eval/reward", "held-out, sampled", named("sampled")],
    ["eval/reward_greedy", "held-out, greedy", named("greedy")],
  ], { wide: true, points: 1, target: "orchestrator.eval.target" }],
  ["Pairs with the better answer ahead", "share of pairs", [
    ["dpo/accuracy", "training", named("training")],
    ["eval/dpo/accuracy", "held-out", named("sampled")],
  ]],
  ["Implicit rewards of pairs", "", [
    ["dpo/chosen_reward", "better answers"],
    ["dpo/rejected_reward", "worse answers"],
    ["dpo/margin", "difference"],
  ]],
  ["Mismatch of engine and trainer", "nats", [["mismatch_kl/mean", "mean"], ["mismatch_kl/max", "max"]], { log: true }],
  ["Vision gap", "nats per token", [
    ["vision_gap/blank", "with grey images"],
    ["vision_gap/shuffled", "with other images"],
    ["vision_gap/order", "with frames in another order"],
    ["vision_gap/first_frame", "with the first frame only"],
  ], { spans: true }],
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
  ["Loss", "", [["loss", "loss"], ["eval/dpo/loss", "held-out pairs"]]],
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
      known(whole)
        ? ["rollout", "train", "sync"].reduce((rest, part) => Math.max(0, rest - (m[`time/${part}`]?.[i] ?? 0)), whole)
        : null,
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
  const keys = [...found].sort((a, b) => most(b) - most(a) || a.localeCompare(b));
  const colours = coloursOf(keys.map((key) => key.slice(wanted.length)));
  return keys.map((key, i) => [key, key.slice(wanted.length), { colour: colours[i] }]);
};

// ── the view ────────────────────────────────────────────────────────────────────────────────────────────────

const STATES = {
  finished: ["finished", "good"],
  target_reached: ["target reached", "good"],
  blind: ["stopped: the reward rose blind", "bad"],
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
    run.doctor && el("table", { class: "doctor" }, el("tbody", {}, run.doctor.checks.map((line) =>
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
    grid.append(...chartsOf(title, unit, keys, options, options.stacked));
  }
  grid.append(chart("Warm-up loss", "nats per token", [["loss", "supervised"]], { source: "supervised", colour: 3 }) ?? "");
  if (!grid.children.length) grid.replaceWith(el("p", { class: "empty" }, "No metrics yet: metrics.jsonl is empty."));
  for (const build of SECTIONS_OF_CURVES) {
    const [shown, keys] = build();
    section.append(shown ?? "");
    keys.forEach((key) => used.add(key));
  }

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

