"use strict";
// Sections below the first charts: evaluation sets, reward terms, tasks of a mixture, and the data. Each function returns
// [its element or null, the keys of metrics.jsonl that it shows].

const SECTIONS_OF_CURVES = [buildSets, buildTerms, buildTasks, buildData];

const named = (name, more = {}) => ({ colour: coloursOf([name])[0], ...more });
const shownKeys = (keys) => keys.filter(([key]) => RUNS.some((run) => run.metrics[key]?.some(known)));

// One chart with a line per key. With several runs, a line per run: `apart` then gives each key a chart of its own.
function chartsOf(title, unit, keys, options = {}, apart = false) {
  const made = apart && SEVERAL
    ? keys.map(([key, label, look = {}]) => chart(options.short ? `${label}: ${options.short}` : `${title}: ${label}`, unit,
      [[key, label, look]], options))
    : [chart(title, unit, keys, options)];
  return made.filter(Boolean);
}

function titled(title, note, ...parts) {
  const shown = parts.flat().filter(Boolean);
  if (!shown.length) return null;
  return el("section", { class: "part", data: { part: title } }, el("h2", {}, title), note && el("p", { class: "muted" }, note), shown);
}

const gridOf = (...made) => (made.flat().length > 0 ? el("div", { class: "charts" }, made) : null);

// The names in keys of metrics.jsonl, in their order: the first group of `pattern`.
function namesIn(pattern, others = []) {
  const found = RUNS.flatMap((run) => Object.keys(run.metrics)).map((key) => pattern.exec(key)?.[1]);
  return [...new Set(found)].filter((name) => name !== undefined && !others.includes(name));
}

// ── evaluation sets ─────────────────────────────────────────────────────────────────────────────────────────

const setNames = () => [...new Set(RUNS.flatMap((run) => run.sets.map((each) => each.name)))];
const scoresOf = (name) => Object.assign({}, ...RUNS.flatMap((run) => run.sets.filter((each) => each.name === name)).map((each) => each.scores));
const errorOf = (key) => ({ se: `${key}_se` });

// [key, label, look] of the scores of a set, the most telling ones first. Of several pass@k, the largest k is shown.
function linesOfSet(name) {
  const scores = scoresOf(name);
  const k = (score) => Number(score.split("@")[1]);
  const passes = Object.keys(scores).filter((score) => score.startsWith("pass@")).sort((a, b) => k(b) - k(a));
  const line = (score, label, colour, more = {}) => score in scores
    && [scores[score], label, { ...colour, ...errorOf(scores[score]), ...more }];
  return [
    line("reward", passes.length && k(passes[0]) > 1 ? `avg@${k(passes[0])}` : "sampled", named("sampled")),
    line("reward_greedy", "greedy", named("greedy")),
    ...passes.map((score, i) => line(score, score, { colour: "--c0" }, i ? { hidden: true, dash: [4, 3] } : { hidden: k(score) === 1 })),
    ...Object.keys(scores).filter((score) => score.startsWith("maj@")).map((score) => line(score, score, { colour: "--c5" })),
    line("pass_greedy", "passed, greedy", { colour: "--c6" }, { hidden: true }),
  ].filter(Boolean);
}

function buildSets() {
  const names = setNames();
  const keys = RUNS.flatMap((run) => run.sets.flatMap((each) => [
    ...Object.values(each.scores).flatMap((key) => [key, `${key}_se`]), ...each.by.flatMap(([, pairs]) => pairs.map(([, key]) => key))]));
  if (!names.length) return [null, keys];
  const colours = coloursOf(names, ["training", "sampled", "greedy"]);
  const first = names.map((name, i) => {
    const scores = scoresOf(name);
    const key = scores.reward ?? scores.reward_greedy;
    return [key, scores.reward ? name : `${name}, greedy`, { colour: colours[i], ...errorOf(key) }];
  });
  const main = [["eval/reward", "main evaluation", named("sampled")]];
  const overview = SEVERAL ? [] : chartsOf("Reward by set", "mean ± standard error", shownKeys([...main, ...first]), { wide: true });
  const each = names.flatMap((name, i) => {
    const lines = shownKeys(linesOfSet(name));
    const options = { dot: SEVERAL ? null : colours[i] };
    return SEVERAL ? lines.filter(([, , look]) => !look.hidden).flatMap((line) => chartsOf(`${name}: ${line[1]}`, "", [line]))
      : chartsOf(name, "scores", lines, options);
  });
  const columns = names.flatMap((name, i) => columnTables(name, colours[i]));
  return [titled("Evaluation sets", null, gridOf(overview, each), setTable(names, colours),
    columns.length > 0 && el("div", { class: "columns" }, columns)), keys];
}

// The newest scores of every set.
function setTable(names, colours) {
  const titles = ["sampled", "greedy"];
  const rows = RUNS.flatMap((run) => run.sets.map(({ name, scores }) => {
    const m = run.metrics;
    const score = (key) => {
      const [value, error] = [lastOf(m[key]), lastOf(m[`${key}_se`])];
      return known(value) ? [fmt.number(value, 3), el("small", {}, known(error) ? ` ± ${fmt.number(error, 2)}` : "")] : "–";
    };
    const best = (kind) => Object.keys(scores).filter((each) => each.startsWith(kind)).sort((a, b) => a.split("@")[1] - b.split("@")[1]).at(-1);
    const at = (kind) => (best(kind) ? [el("small", {}, `${best(kind)} `), ...[score(scores[best(kind)])].flat()] : "–");
    return el("tr", { data: { set: name } },
      el("th", { scope: "row" }, el("i", { class: "dot", style: { background: `var(${SEVERAL ? paletteName(run.index) : colours[names.indexOf(name)]})` } }),
        SEVERAL ? `${name} · ${NAMES[run.index]}` : name),
      el("td", {}, fmt.count(lastOf(m[scores.problems]))),
      el("td", {}, score(scores.reward)), el("td", {}, score(scores.reward_greedy)),
      el("td", {}, at("pass@")), el("td", {}, at("maj@")),
      el("td", {}, fmt.percent(lastOf(m[scores.truncated ?? scores.truncated_greedy]))),
      el("td", {}, fmt.count(lastOf(m[scores.faults]) ?? 0)));
  }));
  return el("div", { class: "tablebox" }, el("table", { class: "runs sets" },
    el("thead", {}, el("tr", {}, ["newest evaluation", "problems", ...titles, "pass@k", "maj@k", "truncated", "faults"].map((title) =>
      el("th", { scope: "col" }, title)))),
    el("tbody", {}, rows)));
}

// A table per column of a set: the reward of each value, and with one run its course.
function columnTables(name, colour) {
  const holders = RUNS.filter((run) => run.sets.some((each) => each.name === name));
  const of = (run) => new Map(run.sets.find((each) => each.name === name).by.map(([column, pairs]) => [column, new Map(pairs)]));
  const maps = holders.map(of);
  return [...new Set(maps.flatMap((map) => [...map.keys()]))].map((column) => {
    const values = [...new Set(maps.flatMap((map) => [...(map.get(column)?.keys() ?? [])]))];
    const head = SEVERAL ? holders.map((run) => NAMES[run.index]) : ["first", "newest", "course", ""];
    const most = Math.max(1e-9, ...maps.flatMap((map, i) => values.map((value) => lastOf(holders[i].metrics[map.get(column)?.get(value)]) ?? 0)));
    return el("div", { class: "tablebox" }, el("table", { class: "runs by", data: { set: name, column } },
      el("caption", {}, !SEVERAL && el("i", { class: "dot", style: { background: `var(${colour})` } }), `${name} by ${column}`,
        el("small", {}, "mean reward")),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, column), head.map((title) => el("th", { scope: "col", class: SEVERAL ? "" : title }, title)))),
      el("tbody", {}, values.map((value) => {
        const courses = maps.map((map, i) => holders[i].metrics[map.get(column)?.get(value)] ?? []);
        const newest = lastOf(courses[0]);
        return el("tr", {}, el("th", { scope: "row", title: value }, value),
          SEVERAL ? courses.map((course) => el("td", {}, fmt.number(lastOf(course), 3)))
            : [el("td", { class: "muted" }, fmt.number(firstOf(courses[0]), 3)), el("td", {}, fmt.number(newest, 3)),
              el("td", { class: "course" }, sparkline(courses[0].filter(known), colour)),
              el("td", { class: "share" }, el("i", { style: { width: `${100 * Math.max(0, (newest ?? 0) / most)}%`, background: `var(${colour})` } }))]);
      }))));
  });
}

// A small line without axes.
function sparkline(values, colour) {
  const [width, height] = [72, 18];
  const [low, high] = [Math.min(0, ...values), Math.max(...values, 1e-9)];
  const at = (value, i) => [2 + (values.length > 1 ? (i / (values.length - 1)) * (width - 4) : width - 4), height - 2 - ((value - low) / (high - low)) * (height - 4)];
  const svg = (tag, options) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(options)) made.setAttribute(key, value);
    made.style.setProperty("color", `var(${colour})`);
    return made;
  };
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  picture.append(svg("polyline", { fill: "none", stroke: "currentColor", "stroke-width": 1.5, points: values.map((v, i) => at(v, i).join()).join(" ") }));
  if (values.length) {
    const [x, y] = at(values.at(-1), values.length - 1);
    picture.append(svg("circle", { cx: x, cy: y, r: 2, fill: "currentColor" }));
  }
  return picture;
}

// ── reward terms and tasks ──────────────────────────────────────────────────────────────────────────────────

// Charts with a line per name: [title, unit, name → key]. With several runs, a chart per name.
function linesByName(names, wanted, taken = []) {
  const colours = coloursOf(names, taken);
  const keys = [];
  const made = wanted.flatMap(([title, unit, keyOf, options = {}]) => {
    const lines = shownKeys(names.map((name, i) => [keyOf(name), name, { colour: colours[i] }]));
    keys.push(...lines.map(([key]) => key));
    return lines.length ? chartsOf(title, unit, lines, options, true) : [];
  });
  return [gridOf(made), keys];
}

function buildTerms() {
  const names = namesIn(/^reward\/([^]+)$/, ["mean", "std"]);
  const [grid, keys] = linesByName(names, [
    ["Reward terms, training", "reward", (name) => `reward/${name}`, { short: "training" }],
    ["Reward terms, held-out, sampled", "reward", (name) => `eval/reward/${name}`, { short: "held-out, sampled" }],
    ["Reward terms, held-out, greedy", "reward", (name) => `eval/reward/${name}_greedy`, { short: "held-out, greedy" }],
  ]);
  return [titled("Reward terms", "Means of each term, before its weight, over the rollouts in which it does not abstain.", grid), keys];
}

function buildTasks() {
  const names = namesIn(/^(?:eval\/)?by_task\/([^]+)\/rollouts\/total$/);
  const [grid, keys] = linesByName(names, [
    ["Reward by task, training", "reward", (name) => `by_task/${name}/reward/mean`, { short: "training" }],
    ["Reward by task, held-out, sampled", "reward", (name) => `eval/by_task/${name}/reward`, { short: "held-out, sampled" }],
    ["Reward by task, held-out, greedy", "reward", (name) => `eval/by_task/${name}/reward_greedy`, { short: "held-out, greedy" }],
    ["Rollouts by task", "rollouts", (name) => `by_task/${name}/rollouts/total`, { stacked: true, short: "rollouts" }],
  ]);
  return [titled("Tasks of the mixture", null, grid), keys];
}

// ── data ────────────────────────────────────────────────────────────────────────────────────────────────────

const DATA_CHARTS = [
  ["Groups sampled by refill", "groups", [["refill/sampled", "played"], ["refill/discarded", "thrown away"], ["refill/missing", "missing"]]],
  ["Curriculum", "problems", [
    ["curriculum/known", "with a pass rate"], ["curriculum/solved", "solved"], ["curriculum/hopeless", "hopeless"],
    ["curriculum/passed_over", "passed over in the step"]]],
  ["Passes over the data", "passes", [["data/epoch", "passes"]]],
  ["Rows drawn", "rows", [["data/rows_seen", "training rows"]]],
];

function buildData() {
  const keys = DATA_CHARTS.flatMap(([, , wanted]) => wanted.map(([key]) => key));
  const made = DATA_CHARTS.flatMap(([title, unit, wanted]) => chartsOf(title, unit, shownKeys(wanted)));
  const bad = RUNS.some((run) => run.metrics["data/bad_rows"]?.some((value) => value > 0));
  if (bad) made.push(...chartsOf("Bad rows found", "rows", [["data/bad_rows", "of the training data"]], { colour: 5 }));
  return [titled("Data", null, gridOf(made), RUNS.map(badRowTable)), [...keys, "data/bad_rows"]];
}

const PHASES = { supervised: "supervised step", rl: "step", eval: "evaluation after step" };

// Rows that cannot be used, by reason; null where there are none.
function badRowTable(run) {
  const { count, reasons, shown } = run.bad_rows;
  if (!count) return null;
  const more = reasons > shown.length ? `, of which the ${shown.length} most frequent are shown` : "";
  return el("div", { class: "tablebox" }, el("table", { class: "runs badrows", data: { run: run.name } },
    el("caption", {}, SEVERAL ? `Bad rows of ${NAMES[run.index]}` : "Bad rows",
      el("small", {}, `${fmt.count(count)} ${count === 1 ? "row" : "rows"} left out, ${fmt.count(reasons)} ${reasons === 1 ? "reason" : "reasons"}${more}; `
        + "numbers in a reason are those of its first row")),
    el("thead", {}, el("tr", {}, ["rows", "reason", "first rows"].map((title) => el("th", { scope: "col" }, title)))),
    el("tbody", {}, shown.map((kind) => el("tr", {},
      el("td", {}, fmt.count(kind.count)),
      el("td", { class: "reason" }, kind.reason),
      el("td", { class: "places" }, el("ul", {}, kind.rows.map(([place, step, phase]) => el("li", {}, place,
        el("small", {}, ` ${PHASES[phase] ?? phase} ${step}`)))), kind.count > kind.rows.length
        && el("small", {}, `and ${fmt.count(kind.count - kind.rows.length)} more in bad_rows.jsonl`)))))));
}
