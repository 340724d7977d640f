"use strict";
// One chart, drawn by uPlot: its header, its legend and its plot. The legends of all charts show the values under the
// shared cursor.

const GROUP = "step"; // the name of the shared cursor
const charts = [];

// Returns null where no run has any of the keys, which are [key, label, {colour, dash, hidden, se}]: a palette name, a
// dash pattern of uPlot, whether the line is hidden at first, and the key of its standard error.
function chart(title, unit, keys, options = {}) {
  const source = options.source ?? "metrics";
  const { stacked = false, log = false, scale = 1 } = options;
  const holders = RUNS.filter((run) => keys.some(([key]) => run[source][key]?.some(known)));
  if (!holders.length) return null;
  const lines = linesOf(holders, keys, source, options.colour ?? 0);
  const raw = tableOf(holders, lines, source, (value) => (known(value) ? value * scale : null));
  const stacks = stacked && !SEVERAL;
  const errors = lines.some((line) => line.se) ? tableOf(holders, lines, source, (value) => value, "se") : null;
  const bounds = errors ? boundsOf(raw, errors, lines) : [];
  const drawn = [...(stacks ? stack(raw) : log ? logarithms(raw) : raw), ...bounds.flatMap(({ high, low }) => [high, low])];
  const bands = bounds.map(({ line }, i) => ({ line, high: lines.length + 1 + 2 * i, low: lines.length + 2 + 2 * i }));

  let plot = null;
  const values = lines.map(() => el("b"));
  const at = el("span", { class: "at" });
  const canvas = el("div", { class: "plot", tabindex: "0", role: "img",
    "aria-label": `${title}: left and right arrow keys move the cursor` });
  const box = el("article", { class: `chart${options.wide ? " wide" : ""}`, data: { title } },
    el("header", {}, options.dot && el("i", { class: "dot", style: { background: `var(${options.dot})` } }),
      el("h3", { title }, title), unit && el("small", {}, unit), at,
      button("CSV", `Download the values of “${title}”`, () => saveChart(title, holders, lines, source), { class: "quiet" })),
    legendOf(lines, values, (index, show) => {
      plot?.setSeries(index + 1, { show });
      const band = bands.find(({ line }) => line === index);
      if (band) for (const series of [band.high, band.low]) plot?.setSeries(series, { show });
    }), canvas);

  const read = () => {
    const index = plot?.cursor.idx;
    const over = known(index) && plot.cursor.left >= 0;
    at.textContent = over ? `step ${fmt.count(raw[0][index])}` : "";
    values.forEach((value, i) => {
      // A metric that few steps have (an evaluation) shows its newest value up to the cursor.
      const newest = (column) => (over && !lines[i].few ? column[index] : lastOf(over ? column.slice(0, index + 1) : column));
      const error = lines[i].se ? newest(errors[i + 1]) : null;
      value.textContent = fmt.number(newest(raw[i + 1])) + (known(error) ? ` ± ${fmt.number(error * scale, 2)}` : "");
    });
  };
  const draw = () => {
    const shown = plot ? plot.series.map((series) => series.show) : null;
    plot?.destroy();
    plot = null;
    if (!canvas.clientWidth) return; // hidden: drawn once it is visible
    const fewSteps = raw[0].length < 3;
    plot = new uPlot(plotOptions(canvas.clientWidth, lines, { ...options, log, stacks, fewSteps, bands }, shown, read), drawn, canvas);
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
    keys.filter(([key]) => run[source][key]?.some(known)).map(([key, label, look = {}], place) => ({
      run, key, label, place,
      name: SEVERAL ? (keys.length > 1 ? `${NAMES[run.index]} · ${label}` : NAMES[run.index]) : label,
      few: sparse(run[source][key]),
      colour: SEVERAL ? paletteName(run.index) : look.colour ?? paletteName(firstColour + place),
      dash: SEVERAL ? (place ? [[5, 4], [1.5, 3]][(place - 1) % 2] : undefined) : look.dash,
      hidden: look.hidden ?? false,
      se: look.se && run[source][look.se]?.some(known) ? look.se : null,
    })),
  );
}

// [steps, values of each line, or of the metric that its `of` names]; the steps of several runs are joined.
function tableOf(holders, lines, source, shape, of = "key") {
  const tables = holders.map((run) => [
    run[source].step,
    ...lines.filter((line) => line.run === run).map((line) => (run[source][line[of]] ?? run[source].step.map(() => null)).map(shape)),
  ]);
  return tables.length > 1 ? uPlot.join(tables) : tables[0];
}

// The ends of value ± standard error, of each line that has one.
function boundsOf(raw, errors, lines) {
  const end = (i, sign) => raw[i + 1].map((value, row) => (known(value) ? value + sign * (errors[i + 1][row] ?? 0) : null));
  return lines.flatMap((line, i) => (line.se ? [{ line: i, high: end(i, 1), low: end(i, -1) }] : []));
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
    const mark = el("i", { style: { background: `var(${line.colour})` }, class: line.dash ? "dash" : "" });
    const item = button([mark, el("span", {}, line.name), values[i]], `Show or hide ${line.name}`, () => {
      const on = item.getAttribute("aria-pressed") !== "true";
      item.setAttribute("aria-pressed", on);
      setShown(i, on);
    }, { "aria-pressed": String(!line.hidden) });
    return el("li", {}, item);
  }));
}

// uPlot's options. `shown` says which series are visible (null: all); `read` runs when the cursor moves.
function plotOptions(width, lines, { log, stacks, fewSteps, spans, bands: errorBands, target: targetKey }, shown, read) {
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
      points: { size: (u, i) => (i <= lines.length ? 7 : 0), width: (u, i) => (i <= lines.length ? 2 : 0), fill: surface },
    },
    scales: { x: { time: false }, y: { range: (u, low, high) => (log ? decades(low, high) : margins(low, high, stacks)) } },
    axes: axesOf({ stroke: ink, font, grid: { stroke: grid, width: 1 }, ticks: { show: false }, gap: 6 }, log),
    series: [{}, ...lines.map((line, i) => {
      const stroke = colour(line.colour);
      return {
        stroke,
        width: 1.6,
        fill: stacks ? faded(stroke, 0.28) : undefined,
        dash: line.dash,
        spanGaps: SEVERAL || line.few || spans,
        points: { show: line.few || fewSteps, size: 6, fill: surface, stroke, width: 1.6 },
        show: shown ? shown[i + 1] : !line.hidden,
      };
    }), ...errorBands.flatMap(({ line, high }) => [high, high + 1].map((at) => (
      { spanGaps: true, width: 0, points: { show: false }, show: shown ? shown[at] : !lines[line].hidden })))],
    bands: stacks ? lines.slice(1).map((_, i) => ({ series: [i + 2, i + 1] }))
      : errorBands.map(({ line, high, low }) => ({ series: [high, low], fill: faded(colour(lines[line].colour), 0.14) })),
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

// Whether few steps have the metric: a line would not join its values, so points are drawn and joined over the gaps.
function sparse(values) {
  const alone = values.filter((value, i) => known(value) && !known(values[i - 1]) && !known(values[i + 1]));
  return alone.length > 0 && 2 * alone.length >= values.filter(known).length;
}

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
