"use strict";
// Held-out reward over seconds, one line per evaluated run, drawn by uPlot.
// The data is a list of {name, color, seconds, reward}. Names are set as text, never as HTML.

(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("plot");
  if (runs.length === 0) {
    place.textContent = "No run has been evaluated yet.";
    return;
  }
  const ink = getComputedStyle(document.body).color;
  const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
  const axis = (label) => ({ label, stroke: ink, grid: { stroke: "#8883" }, ticks: { stroke: "#8883" } });
  const data = uPlot.join(runs.map((run) => [run.seconds, run.reward]));
  const highest = Math.max(1, ...runs.flatMap((run) => run.reward));
  const plot = new uPlot(
    {
      width: place.clientWidth || 900,
      height: 420,
      scales: { x: { time: false }, y: { range: [-0.02, highest + 0.02] } },
      axes: [axis("seconds"), axis("held-out reward (sampled)")],
      series: [
        { label: "seconds", value: (_, value) => (value === null ? "–" : value.toFixed(0)) },
        ...runs.map((run) => ({
          label: run.name,
          stroke: run.color,
          width: 2,
          points: { show: true, size: 6 },
          spanGaps: true, // runs are evaluated at different seconds
          value: (_, value) => number(value),
        })),
      ],
    },
    data,
    place,
  );
  addEventListener("resize", () => plot.setSize({ width: place.clientWidth, height: 420 }));
})();
