"use strict";
// The config: values that differ from the defaults, and with several runs, from each other.

function buildConfig(section) {
  const keys = [...new Set([...RUNS.flatMap((run) => Object.keys(run.config)), ...Object.keys(DATA.defaults)])].sort();
  const places = new Set(["output_dir", "resume", "run", "runs", "step"]); // where a run is stored; not compared
  const text = (tree, key) => (key in tree ? fmt.value(tree[key]) : "");
  const rows = keys.map((key) => {
    const own = RUNS.map((run) => text(run.config, key));
    const usual = text(DATA.defaults, key);
    const changed = !places.has(key) && own.some((value) => value !== usual);
    const differs = !places.has(key) && new Set(own).size > 1;
    const row = el("tr", { class: `${changed ? "changed" : ""} ${differs ? "differs" : ""}`, data: { key } },
      el("th", { scope: "row" }, key),
      own.map((value) => el("td", { class: !places.has(key) && value !== usual ? "other" : "" }, value)),
      el("td", { class: "muted" }, places.has(key) ? "" : usual));
    return { key, row, changed, differs, all: `${key} ${own.join(" ")}`.toLowerCase() };
  });
  const find = el("input", { type: "search", placeholder: "Filter by key or value", "aria-label": "Filter by key or value" });
  const empty = el("p", { class: "empty" });
  let which = SEVERAL ? "differs" : "changed";
  const apply = () => {
    const wanted = find.value.trim().toLowerCase();
    let count = 0;
    for (const each of rows) {
      each.row.hidden = !((which === "all" || each[which]) && each.all.includes(wanted));
      count += !each.row.hidden;
    }
    empty.hidden = count > 0;
    empty.textContent = count ? "" : which === "changed" && !wanted ? "Every value is the default." : "No key matches.";
  };
  find.addEventListener("input", apply);
  const choices = [["changed", `not default (${rows.filter((each) => each.changed).length})`, "Keys whose value is not the default"],
    ["all", `all (${rows.length})`, "All keys"]];
  if (SEVERAL) choices.unshift(["differs", `differs (${rows.filter((each) => each.differs).length})`, "Keys in which the runs differ"]);
  const environment = [...new Set(RUNS.flatMap((run) => Object.keys(run.environment)))];
  section.append(
    el("div", { class: "filters" }, segmented("Which keys", choices, which, (value) => {
      which = value;
      apply();
    }), find,
    button("JSON", "Download the config with dotted keys", () => download("config.json",
      JSON.stringify(SEVERAL ? Object.fromEntries(RUNS.map((run) => [NAMES[run.index], run.config])) : RUNS[0].config, null, 2), "application/json"),
    { class: "quiet" })),
    el("div", { class: "tablebox" }, el("table", { class: "config" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "key"), NAMES.map((name) => el("th", { scope: "col" }, SEVERAL ? name : "this run")),
        el("th", { scope: "col" }, "(default)"))),
      el("tbody", {}, rows.map((each) => each.row)))),
    empty,
    el("h3", {}, "Environment"),
    el("div", { class: "tablebox" }, el("table", { class: "config" }, el("tbody", {}, environment.map((key) => {
      const own = RUNS.map((run) => text(run.environment, key));
      return el("tr", {}, el("th", { scope: "row" }, key),
        own.map((value) => el("td", { class: new Set(own).size > 1 ? "other" : "" }, value)));
    })))));
  apply();
}
