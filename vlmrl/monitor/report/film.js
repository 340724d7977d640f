"use strict";
// An episode as a film: the frame of each turn with the action under it, the rewards of the turns, and their sum so far.

const FRAME_MS = 700; // from one frame to the next while the film plays

// The hashes of the images that a turn adds. A turn that starts over shows earlier frames again: its last message with
// images has the new one.
function frameOf(run, turn) {
  const images = (message) => message.content.filter((part) => part.type === "image" && part.hash).map((part) => part.hash);
  return run.messages[turn.messages].map(images).findLast((hashes) => hashes.length) ?? [];
}

// A film needs several turns, each with an image.
const hasFilm = (rollout) => rollout.turns.length > 1 && rollout.turns.every((turn) => frameOf(rollout.run, turn).length > 0);

// The film of a rollout. `articles` are the turns as the page shows them below; that of the present frame is marked.
function filmOf(rollout, articles) {
  const { run, turns } = rollout;
  let sum = 0;
  const sums = turns.map((turn) => (sum += turn.reward));
  const most = Math.max(...turns.map((turn) => Math.abs(turn.reward))) || 1;
  const film = { at: 0, timer: null, element: null };
  const last = turns.length - 1;

  const screen = el("div", { class: "screen" });
  const action = el("p", { class: "action" });
  const facts = el("div", { class: "facts", "aria-live": "polite" });
  const slider = el("input", { type: "range", min: "0", max: String(last), step: "1", value: "0", "aria-label": "Turn of the film",
    on: { input: () => seek(Number(slider.value)) } });
  const bars = turns.map((turn, at) => el("i", {
    class: turn.reward < 0 ? "below" : "", style: { "--share": Math.abs(turn.reward) / most },
    title: `turn ${at + 1}: ${fmt.number(turn.reward, 3)}`, on: { click: () => seek(at) },
  }));
  const toggle = button("▶", "Play or pause (p, or space)", () => film.toggle(), { class: "icon", "aria-label": "Play" });

  function show(at) {
    film.at = at;
    const turn = turns[at];
    screen.replaceChildren(...frameOf(run, turn).map((hash) => picture(hash, { room: "film" })));
    action.textContent = turn.text || "(an empty answer)";
    facts.replaceChildren(...[
      fact("turn", `${at + 1} of ${turns.length}`),
      fact("turn reward", fmt.number(turn.reward, 3)),
      fact("sum so far", fmt.number(sums[at], 4)),
      at === last && fact("reward of the episode", fmt.number(rollout.reward, 4)),
      at === last && fact("end", rollout.stop),
    ].filter(Boolean));
    slider.value = String(at);
    slider.setAttribute("aria-valuetext", `turn ${at + 1} of ${turns.length}`);
    bars.forEach((bar, index) => bar.classList.toggle("now", index === at));
    articles.forEach((article, index) => article.classList.toggle("now", index === at));
  }

  function seek(at) {
    film.pause();
    show(Math.max(0, Math.min(last, at)));
  }

  film.step = (by) => seek(film.at + by);
  film.pause = () => {
    clearInterval(film.timer);
    film.timer = null;
    toggle.textContent = "▶";
    toggle.setAttribute("aria-label", "Play");
  };
  film.toggle = () => {
    if (film.timer !== null) {
      film.pause();
      return;
    }
    if (film.at === last) show(0);
    film.timer = setInterval(() => {
      show(film.at + 1);
      if (film.at === last) film.pause();
    }, FRAME_MS);
    toggle.textContent = "❚❚";
    toggle.setAttribute("aria-label", "Pause");
  };

  const controls = el("div", { class: "controls" },
    button("|◂", "First frame", () => seek(0), { class: "icon", "aria-label": "First frame" }),
    button("◂", "One frame back (,)", () => film.step(-1), { class: "icon", "aria-label": "One frame back" }),
    toggle,
    button("▸", "One frame on (.)", () => film.step(1), { class: "icon", "aria-label": "One frame on" }),
    slider);
  film.element = el("section", { class: "film", "aria-label": "Film of the episode", tabindex: "0", on: { keydown: (event) => film.key(event) } },
    el("div", { class: "frame" }, screen, action),
    el("div", { class: "side-of-film" }, facts, el("div", { class: "bars", title: "rewards of the turns" }, bars), controls));

  // The keys of the whole page work here, too; arrows and space are for the film alone.
  film.key = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const own = { p: () => film.toggle(), ",": () => film.step(-1), ".": () => film.step(1) };
    if (event.target.tagName !== "BUTTON") own[" "] = own.p; // a button is pressed by it
    if (event.target !== slider) {
      Object.assign(own, { ArrowLeft: own[","], ArrowRight: own["."], Home: () => seek(0), End: () => seek(last) });
    }
    if (!own[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    own[event.key]();
  };
  show(0);
  return film;
}
