"use strict";
// Rewards over seconds, drawn by uPlot: a plot per panel, with a line per run that has its metric.
// The data is a list of {title, runs: [{name, color, seconds, values, errors}]}. Texts are set as text, never as HTML.

(() => {
  const panels = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("plots");
  if (panels.length === 0) {
    place.textContent = "No run has a step or an evaluation yet.";
    return;
  }
  const HEIGHT = 280;
  const ink = getComputedStyle(document.body).color;
  const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
  const axis = (label) => ({ label, stroke: ink, grid: { stroke: "#8883" }, ticks: { stroke: "#8883" } });
  const lineOf = (run, i, count) => ({
    label: run.name,
    stroke: run.color,
    width: 2,
    points: { show: run.values.length <= 60, size: 6 },
    spanGaps: true, // runs are evaluated at different seconds
    value: (u, value, _, at) => {
      const high = run.errors && at !== null ? u.data[count + 1 + 2 * i][at] : null;
      return high === null || high === undefined ? number(value) : `${number(value)} ± ${number(high - value)}`;
    },
  });
  const plots = panels.map(({ title, runs }) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    figure.append(caption);
    place.append(figure);
    // Behind the lines, the ends of value ± standard error of each line.
    const ends = runs.map((run) => [1, -1].map((sign) => run.values.map((value, i) => (run.errors ? value + sign * run.errors[i] : null))));
    const tables = runs.map((run, i) => [run.seconds, run.values, ...ends[i]]);
    const joined = uPlot.join(tables);
    const column = (run, part) => joined[1 + 3 * run + part];
    const data = [joined[0], ...runs.map((_, i) => column(i, 0)), ...runs.flatMap((_, i) => [column(i, 1), column(i, 2)])];
    const highest = Math.max(1, ...ends.flatMap(([high]) => high), ...runs.flatMap((run) => run.values));
    const lowest = Math.min(0, ...ends.flatMap(([, low]) => low), ...runs.flatMap((run) => run.values));
    const plot = new uPlot(
      {
        width: figure.clientWidth || 500,
        height: HEIGHT,
        scales: { x: { time: false }, y: { range: [lowest - 0.02, highest + 0.02] } },
        axes: [axis("seconds"), axis("reward")],
        cursor: { points: { size: (u, i) => (i <= runs.length ? 8 : 0) } },
        series: [
          { label: "seconds", value: (_, value) => (value === null ? "–" : value.toFixed(0)) },
          ...runs.map((run, i) => lineOf(run, i, runs.length)),
          ...runs.flatMap(() => [1, 2].map(() => ({ label: "", class: "end", width: 0, points: { show: false }, spanGaps: true }))),
        ],
        bands: runs.map((run, i) => ({
          series: [runs.length + 1 + 2 * i, runs.length + 2 + 2 * i],
          fill: run.color.replace("rgb", "rgba").replace(")", ", 0.15)"),
        })),
      },
      data,
      figure,
    );
    return [plot, figure];
  });
  addEventListener("resize", () => plots.forEach(([plot, figure]) => plot.setSize({ width: figure.clientWidth, height: HEIGHT })));
})();
