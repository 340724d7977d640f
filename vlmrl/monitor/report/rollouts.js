"use strict";
// The rollout browser: the list of groups, its filters, and the chosen rollout. tokens.js shows that rollout.

const state = {
  tint: "advantage",
  tokens: false, // prompts as tokens instead of messages
  siblings: false,
  filter: {},
  chosen: null,
};

let all = []; // rollouts of all runs, in order
let groups = []; // [{key, title, rollouts}]
let matching = new Set();
const view = {};

function collect() {
  for (const run of RUNS) {
    for (const rollout of run.rollouts) {
      rollout.run = run;
      // In mode=play no policy sampled the tokens: their version is -1.
      for (const turn of rollout.turns) turn.trained = rollout.split === "train" && run.columns.versions[turn.at] >= 0;
      all.push(rollout);
    }
  }
  // Groups of the list. One run: the siblings of a step, or the evaluations of a held-out problem. Several runs: all
  // rollouts of one problem.
  const byKey = new Map();
  for (const rollout of all) {
    const kind = rollout.split === "train" ? "train" : "held-out";
    const key = SEVERAL ? `${kind}/${rollout.problem}`
      : kind === "train" ? rollout.group : `${kind}${setOf(rollout)}/${rollout.group.split("/").at(-1)}`;
    if (!byKey.has(key)) {
      byKey.set(key, { key, kind, problem: rollout.problem, step: rollout.step, rollouts: [] });
    }
    byKey.get(key).rollouts.push(rollout);
    rollout.of = byKey.get(key);
  }
  groups = [...byKey.values()];
  if (SEVERAL) {
    groups = groups.filter((group) => new Set(group.rollouts.map((rollout) => rollout.run)).size > 1)
      .concat(groups.filter((group) => new Set(group.rollouts.map((rollout) => rollout.run)).size === 1));
  } else {
    const last = (group) => Number(group.kind === "held-out");
    groups.sort((a, b) => last(a) - last(b) || a.step - b.step || a.key.localeCompare(b.key));
  }
  for (const group of groups) group.rollouts.sort((a, b) => a.run.index - b.run.index || a.step - b.step);
}

// " ood" for a held-out rollout of the set `ood`, whose group is `eval_ood/000010/03`; "" for the main evaluation.
const setOf = (rollout) => rollout.group.split("/")[0].replace(/^eval_?/, " ").trimEnd();

const idOf = (rollout) => (SEVERAL ? `${rollout.run.index}:${rollout.id}` : rollout.id);

// ── filters ─────────────────────────────────────────────────────────────────────────────────────────────────

const SPLITS = [
  ["", "all", "Training and held-out"],
  ["train", "training", "Training rollouts, dropped ones too"],
  ["eval_sampled", "held-out", "Held-out problems, sampled"],
  ["eval_greedy", "greedy", "Held-out problems, greedy"],
];

function counted(key, name) {
  const counts = new Map();
  for (const rollout of all) counts.set(rollout[key], (counts.get(rollout[key]) ?? 0) + 1);
  return [...counts].filter(([value]) => value !== null).sort((a, b) => b[1] - a[1])
    .map(([value, count]) => [value, `${name}${value} (${fmt.count(count)})`]);
}

function select(label, choices, key) {
  const box = el("select", { "aria-label": label, name: key, on: { change: () => filter(key, box.value) } },
    choices.map(([value, text]) => el("option", { value }, text)));
  return el("label", {}, el("span", {}, label), box);
}

function range(label, key, step) {
  const input = (end, title) => {
    const box = el("input", { type: "number", step, name: `${key}${end}`, placeholder: end === "From" ? "from" : "to",
      "aria-label": `${label} ${title}`, on: { input: () => filter(`${key}${end}`, box.value === "" ? "" : Number(box.value)) } });
    return box;
  };
  return el("label", { class: "range" }, el("span", {}, label), input("From", "from"), "–", input("To", "to"));
}

function buildFilters() {
  const search = el("input", { type: "search", name: "text", placeholder: "group, problem or text   /",
    "aria-label": "Group, problem or text", on: { input: () => filter("text", search.value.trim().toLowerCase()) } });
  view.search = search;
  view.count = el("output", { class: "count", "aria-live": "polite" });
  const split = segmented("Kind of rollout", SPLITS, "", (value) => filter("split", value));
  view.clear = button("Clear", "Remove all filters", () => {
    box.reset();
    state.filter = {};
    split.choose("");
  }, { class: "quiet" });
  const box = el("form", { class: "filters", on: { submit: (event) => event.preventDefault() } },
    split,
    SEVERAL && select("Run", [["", "all"], ...RUNS.map((run) => [String(run.index), NAMES[run.index]])], "run"),
    range("Step", "step", 1),
    range("Reward", "reward", "any"),
    select("Stop reason", [["", "any reason"], ...counted("stop", "")], "stop"),
    select("Dropped", [["", "kept or dropped"], ["kept", "kept"], ["dropped", "dropped"], ...counted("dropped", "")], "dropped"),
    search,
    view.clear,
    el("span", { class: "push" }, view.count,
      button("JSONL", "Download the matching rollouts with all tokens", saveMatching, { class: "quiet" })));
  return box;
}

function filter(key, value) {
  state.filter[key] = value;
  apply();
}

function matches(rollout) {
  const f = state.filter;
  const within = (value, low, high) => (low === "" || low === undefined || value >= low) && (high === "" || high === undefined || value <= high);
  return (!f.split || splitOf(rollout) === f.split)
    && (!f.run || String(rollout.run.index) === f.run)
    && within(rollout.step, f.stepFrom, f.stepTo)
    && within(rollout.reward, f.rewardFrom, f.rewardTo)
    && (!f.stop || rollout.stop === f.stop)
    && (!f.dropped || (f.dropped === "kept" ? !rollout.dropped : f.dropped === "dropped" ? rollout.dropped : rollout.dropped === f.dropped))
    && (!f.text || haystack(rollout).includes(f.text));
}

const haystack = (rollout) => (rollout.text ??= [
  rollout.id, rollout.group, rollout.problem, rollout.error ?? "", ...rollout.turns.map((turn) => turn.text),
].join("\n").toLowerCase());

function apply() {
  matching = new Set(all.filter(matches));
  view.clear.hidden = Object.values(state.filter).every((value) => value === "");
  const stored = RUNS.reduce((sum, run) => sum + run.recorded.rollouts, 0);
  view.count.textContent = `${fmt.count(matching.size)} of ${fmt.count(all.length)}`;
  view.count.title = `${fmt.count(all.length)} rollouts are on this page, ${fmt.count(stored)} in rollouts/`;
  listGroups();
  if (!state.chosen || !matching.has(state.chosen)) {
    const first = all.find((rollout) => matching.has(rollout));
    show(first ?? null);
  } else mark();
}

// ── the list ────────────────────────────────────────────────────────────────────────────────────────────────

const SECTIONS = {
  train: "Training: step, problem, one bar per sibling",
  "held-out": "Held-out: one bar per evaluation",
};

// The rows of bars of a group: one for the siblings of a run, or one sampled and one greedy for a held-out problem.
function stripsOf(group, rollouts) {
  if (SEVERAL) return RUNS.map((run) => [paletteName(run.index), NAMES[run.index], rollouts.filter((each) => each.run === run)]);
  if (group.kind === "train") return [[null, "", rollouts]];
  return [[named("sampled").colour, "sampled", rollouts.filter((each) => splitOf(each) === "eval_sampled")],
    [named("greedy").colour, "greedy", rollouts.filter((each) => splitOf(each) === "eval_greedy")]];
}

function listGroups() {
  const rows = [];
  let heading = null;
  view.cells = new Map();
  for (const group of groups) {
    const here = group.rollouts.filter((rollout) => matching.has(rollout));
    if (!here.length) continue;
    const strips = stripsOf(group, here);
    const spread = here.map((rollout) => rollout.reward);
    const [low, high] = [Math.min(...spread), Math.max(...spread)];
    const section = SEVERAL ? (strips.every(([, , rollouts]) => rollouts.length) ? "In every run" : "In one run") : SECTIONS[group.kind];
    if (section !== heading) rows.push(el("li", { class: "section" }, (heading = section)));
    rows.push(el("li", { class: "group", data: { key: group.key } },
      el("div", { class: "grouphead" },
        SEVERAL ? el("span", { class: "muted" }, group.kind) : group.kind === "train" && el("span", { class: "step" }, `${group.step}`),
        el("span", { class: "problem", title: group.problem }, group.problem),
        el("span", { class: "muted push" }, low === high ? fmt.number(low, 3) : `${fmt.number(low, 2)} – ${fmt.number(high, 2)}`)),
      strips.map(([colour, title, rollouts]) => rollouts.length > 0 && el("div", { class: `strip${colour ? " thin" : ""}` },
        colour && el("i", { class: "dot", style: { background: `var(${colour})` }, title }),
        rollouts.map(cell)))));
  }
  view.list.replaceChildren(...rows);
  if (!rows.length) view.list.append(el("li", { class: "empty" }, all.length ? "No rollout matches." : nothing()));
  mark();
}

const nothing = () => RUNS.some((run) => run.config["monitor.record_rollouts"] === false)
  ? "This run did not record its rollouts (monitor.record_rollouts=false)."
  : "No rollouts yet.";

function cell(rollout) {
  const share = Math.max(0, Math.min(1, rollout.reward / (view.best || 1)));
  const said = `${rollout.id}: reward ${fmt.number(rollout.reward, 3)}${rollout.dropped ? `, dropped (${rollout.dropped})` : ""}`;
  const made = el("button", {
    type: "button", class: `cell${rollout.dropped ? " dropped" : ""}${{ train: "", eval_sampled: " held", eval_greedy: " greedy" }[splitOf(rollout)]}`,
    title: said, "aria-label": said, tabindex: "-1", style: { "--share": share },
    on: { click: () => show(rollout) },
  }, el("i"));
  view.cells.set(rollout, made);
  return made;
}

function mark() {
  view.marked?.removeAttribute("aria-current");
  view.marked?.setAttribute("tabindex", "-1");
  view.markedGroup?.classList.remove("chosen");
  const made = state.chosen && view.cells.get(state.chosen);
  view.marked = made;
  view.markedGroup = made?.closest(".group");
  if (!made) return;
  made.setAttribute("aria-current", "true");
  made.tabIndex = 0;
  view.markedGroup.classList.add("chosen");
  const [row, list] = [view.markedGroup, view.list];
  if (row.offsetTop < list.scrollTop || row.offsetTop + row.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = row.offsetTop - list.clientHeight / 3;
  }
}

function move(by, whole) {
  const shown = [...view.cells.keys()];
  const at = shown.indexOf(state.chosen);
  let next = at + by;
  if (whole) while (shown[next] && shown[next].of === state.chosen?.of) next += by;
  if (shown[next]) show(shown[next]);
  if (document.activeElement?.classList.contains("cell")) view.marked?.focus({ preventScroll: true });
}

// ── files ───────────────────────────────────────────────────────────────────────────────────────────────────

// The format in which the run writes them (vlmrl/record/rollouts.py).
function saveMatching() {
  const numbers = (array, turn) => [...array.subarray(turn.at, turn.at + turn.count)];
  const numbersOrNull = (array, turn) => (Number.isNaN(array[turn.at]) ? null : numbers(array, turn));
  const lines = [...matching].map((rollout) => {
    const { run } = rollout;
    const c = run.columns;
    return JSON.stringify({
      ...(SEVERAL ? { run: run.name } : {}),
      rollout_id: rollout.id, problem_id: rollout.problem, step: rollout.step, split: rollout.split, task: rollout.task,
      index: rollout.index, reward: rollout.reward, rewards: rollout.rewards, reference: rollout.reference, metrics: rollout.metrics,
      stop_reason: rollout.stop, dropped: rollout.dropped,
      filtered: rollout.filtered, error: rollout.error, stdout: rollout.stdout, stderr: rollout.stderr,
      seconds: rollout.seconds, videos: videosOf(rollout),
      turns: rollout.turns.map((turn) => {
        const prompt = run.prompts[turn.prompt];
        return {
          branch: turn.branch, starts_over: turn.starts_over, messages: run.messages[turn.messages], prompt_offset: turn.offset,
          prompt_token_ids: [...c.prompts.subarray(prompt.at, prompt.at + prompt.count)], placeholders: prompt.placeholders,
          completion_ids: numbers(c.ids, turn), logprobs: numbers(c.engine, turn), versions: numbers(c.versions, turn),
          trainer_logprobs: numbersOrNull(c.trainer, turn), entropies: numbersOrNull(c.entropy, turn),
          finish_reason: turn.finish, stop: turn.stop, sampling: turn.sampling, text: turn.text, reward: turn.reward, advantage: turn.advantage,
        };
      }),
    });
  });
  download("rollouts.jsonl", `${lines.join("\n")}\n`, "application/jsonl");
}

// ── the view ────────────────────────────────────────────────────────────────────────────────────────────────

function sampleNote() {
  const deleted = RUNS.filter((run) => run.recorded.deleted)
    .map((run) => ` ${SEVERAL ? NAMES[run.index] : "The run"} ${run.recorded.deleted}.`);
  return shownNote() + deleted.join("");
}

function shownNote() {
  const sum = (key) => RUNS.reduce((total, run) => total + run.recorded[key], 0);
  if (sum("shown") >= sum("rollouts")) return `All ${fmt.count(sum("shown"))} recorded rollouts.`;
  const over = SEVERAL ? "the steps and evaluations that the runs have in common"
    : `${fmt.count(sum("steps"))} steps and ${fmt.count(sum("evaluations"))} evaluations`;
  return `${fmt.count(sum("shown"))} of ${fmt.count(sum("rollouts"))} rollouts: whole groups, evenly spaced over ${over}, and some `
    + "groups for every drop reason. All rollouts are in rollouts/.";
}

function buildRollouts(section) {
  collect();
  state.tint = TINTS[recall("tint")] ? recall("tint") : state.tint;
  view.best = all.reduce((best, rollout) => Math.max(best, rollout.reward), 0);
  view.list = el("ol", { class: "groups", "aria-label": "Groups" });
  view.legend = el("div", { class: "toolbar" });
  view.detail = el("div", { class: "detail", tabindex: "-1" });
  state.siblings = SEVERAL;
  section.append(buildFilters(),
    el("div", { class: "browser" },
      el("div", { class: "side" }, view.list, el("p", { class: "muted sample" }, sampleNote())),
      el("div", { class: "stage" }, view.legend, view.detail)));

  for (const [event, run] of [["mouseover", tell], ["focusin", tell], ["mouseout", silence], ["focusout", silence]]) {
    view.detail.addEventListener(event, (happened) => {
      const token = happened.target.closest?.(".token");
      if (token) run(token);
    });
  }
  view.detail.addEventListener("scroll", silence);
  view.detail.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !event.target.classList.contains("sampled")) return;
    const tokens = [...view.detail.querySelectorAll(".sampled")];
    const next = tokens[tokens.indexOf(event.target) + by];
    event.preventDefault();
    event.stopPropagation();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  // Open the newest training group whose rewards differ, at the rollout with the largest advantage.
  const differs = (group, key) => new Set(group.rollouts.map((rollout) => rollout[key])).size > 1;
  const telling = groups.findLast((group) => group.kind === "train" && differs(group, "reward") && (!SEVERAL || differs(group, "run")));
  const stake = (rollout) => Math.max(0, ...rollout.turns.map((turn) => Math.abs(turn.advantage)));
  const first = (telling ?? groups.at(SEVERAL ? 0 : -1))?.rollouts.reduce((a, b) => (stake(b) > stake(a) ? b : a));
  state.chosen = byPlace() ?? first ?? null;
  apply();
  draw();
}

function byPlace() {
  const place = new URLSearchParams(location.hash.split("?")[1]);
  if (TINTS[place.get("tint")]) state.tint = place.get("tint");
  if (place.has("view")) state.siblings = place.get("view") === "siblings";
  return all.find((rollout) => idOf(rollout) === place.get("rollout"));
}

// The URL names the chosen rollout, so that it can be bookmarked.
function keepPlace() {
  if (!state.chosen || document.getElementById("view-rollouts").hidden) return;
  const place = new URLSearchParams({ rollout: idOf(state.chosen), tint: state.tint, view: state.siblings ? "siblings" : "one" });
  history.replaceState(null, "", `#rollouts?${place}`);
}
