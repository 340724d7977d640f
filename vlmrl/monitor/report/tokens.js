"use strict";
// Show one rollout, or siblings side by side, token by token.

// ── values of a token ───────────────────────────────────────────────────────────────────────────────────────

// `of` returns the value of token t (an index into the columns) of a turn; NaN where it has none.
const TINTS = {
  gap: {
    label: "gap", title: "trainer logprob minus engine logprob", unit: "nats", diverging: true,
    of: (c, t) => c.trainer[t] - c.engine[t],
    none: "Only tokens that were trained on have a trainer logprob.",
  },
  advantage: {
    label: "advantage", title: "advantage of the turn", unit: "", diverging: true,
    of: (c, t, turn) => (turn.trained ? turn.advantage : NaN),
    none: "Held-out rollouts, and those of mode=play, have no advantage.",
  },
  entropy: {
    label: "entropy", title: "entropy of the trainer's distribution at the token", unit: "nats",
    of: (c, t) => c.entropy[t],
    none: "Only tokens that were trained on have an entropy.",
  },
  surprise: {
    label: "surprise", title: "minus the engine's logprob of the token", unit: "nats",
    of: (c, t) => -c.engine[t],
  },
  version: {
    label: "version", title: "policy version that sampled the token", unit: "", distinct: true,
    of: (c, t) => c.versions[t],
  },
};

// The scale of the colours: the 99th percentile of all tokens on the page (of every nth where there are very many). All
// rollouts share it, so that they can be compared.
const scales = {};
function scaleOf(name) {
  if (scales[name]) return scales[name];
  const tint = TINTS[name];
  const every = Math.ceil(RUNS.reduce((sum, run) => sum + run.columns.ids.length, 0) / 50_000);
  const sizes = [];
  for (const rollout of all) {
    const columns = rollout.run.columns;
    for (const turn of rollout.turns) {
      const first = turn.at + ((every - (turn.at % every)) % every);
      for (let t = first; t < turn.at + turn.count; t += every) sizes.push(Math.abs(tint.of(columns, t, turn)));
    }
  }
  return (scales[name] = quantile(sizes, 0.99) || 0);
}

const spell = (run, id) => run.spellings[id] ?? `‹${id}›`;
const isSpecial = (text) => /^<\|.*\|>$/s.test(text) || /^<[a-z/_]+>$/.test(text);

// ── one rollout ─────────────────────────────────────────────────────────────────────────────────────────────

// What the program printed that played the rollout.
const printed = (rollout) => [["standard output", rollout.stdout], ["standard error", rollout.stderr]]
  .filter(([, text]) => text)
  .map(([name, text]) => el("details", { class: "more" }, el("summary", {}, name), el("pre", { class: "note" }, text)));

function show(rollout) {
  state.chosen = rollout;
  mark();
  draw();
  if (rollout) keepPlace();
}

function draw() {
  view.legend.replaceChildren(...legend());
  view.film?.pause();
  view.film = null;
  const rollout = state.chosen;
  if (!rollout) {
    view.detail.replaceChildren(el("p", { class: "empty" }, all.length ? "No rollout matches the filters." : nothing()));
    return;
  }
  view.detail.replaceChildren(...(state.siblings ? siblings(rollout) : single(rollout)));
  paint();
  view.detail.scrollTop = 0;
  view.detail.querySelector(".card.chosen")?.scrollIntoView({ block: "nearest" });
}

const fact = (label, value, kind) => el("div", { class: `fact ${kind ?? ""}` }, el("span", {}, label), el("b", {}, value));

const DROPPED = {
  fault: "its stop reason is a fault",
  empty: "nothing was sampled",
  no_reward: "the task has no reward of its own, and every reward term abstains",
  stray_image_token: "the policy sampled an image token",
  stale: "a token is older than orchestrator.max_staleness",
  zero_advantage: "every advantage of its group is zero",
  gibberish: "it contains a rare, very unlikely token",
  repetition: "it contains a long run of tokens with a probability of nearly 1",
};

function headline(rollout) {
  const c = rollout.run.columns;
  const versions = new Set(rollout.turns.flatMap((turn) => [...c.versions.subarray(turn.at, turn.at + turn.count)]));
  const sampled = rollout.turns.reduce((sum, turn) => sum + turn.count, 0);
  const last = rollout.turns.at(-1);
  return [
    el("div", { class: "title" },
      SEVERAL && el("i", { class: "dot", style: { background: `var(${paletteName(rollout.run.index)})` } }),
      el("h2", {}, rollout.id), el("span", { class: "muted" }, rollout.problem),
      rollout.dropped && el("span", { class: "pill bad", title: DROPPED[rollout.dropped] ?? "" }, `dropped: ${rollout.dropped}`)),
    rollout.dropped && el("p", { class: "note bad" }, `Not trained on: ${DROPPED[rollout.dropped] ?? rollout.dropped}.`),
    rollout.error && el("pre", { class: "note bad" }, rollout.error),
    printed(rollout),
    el("div", { class: "facts" },
      fact("reward", fmt.number(rollout.reward, 4)),
      Object.entries(rollout.rewards).map(([name, value]) => fact(`reward/${name}`, value === null ? "abstains" : fmt.number(value, 4))),
      rollout.reference !== null && fact("reference", shortened(rollout.reference)),
      Object.entries(rollout.metrics).map(([key, value]) => fact(key, fmt.number(value, 4))),
      fact("stop reason", rollout.stop),
      rollout.filtered.length > 0 && fact("matching filters", rollout.filtered.join(", ")),
      fact("step", fmt.count(rollout.step)),
      fact("policy version", [...versions].filter((version) => version >= 0).sort((a, b) => a - b).join(", ") || "–"),
      fact("tokens", last ? `${fmt.count(promptLength(rollout.run, last))} + ${fmt.count(sampled)}` : "–"),
      fact("time", fmt.seconds(rollout.seconds))),
  ];
}

const shortened = (text, most = 120) => (text.length > most ? `${text.slice(0, most)}…` : text);

const promptLength = (run, turn) => turn.offset + run.prompts[turn.prompt].count;

function single(rollout) {
  const turns = rollout.turns.map((turn, index) => turnOf(rollout, turn, index));
  view.film = hasFilm(rollout) ? filmOf(rollout, turns) : null;
  return [
    ...headline(rollout),
    !rollout.turns.length && el("p", { class: "empty" }, "This rollout ended before its first completion."),
    view.film?.element,
    ...turns,
  ].filter(Boolean);
}

const FORKS = {
  history: "the environment replaced the conversation; the policy saw only what follows",
  bridge: "the prompt could not extend the turn before it, so the whole conversation was rendered again",
};

function turnOf(rollout, turn, index) {
  const forked = index > 0 && turn.branch !== rollout.turns[index - 1].branch;
  return el("article", { class: "turn" },
    forked && el("p", { class: "fork" }, `Branch ${turn.branch}: ${turn.starts_over ? FORKS.history : FORKS.bridge}`),
    state.tokens ? promptTokens(rollout.run, turn) : messages(rollout.run, turn),
    el("div", { class: "message completion" },
      el("div", { class: "role" }, "policy"),
      el("div", { class: "said" }, completion(rollout, turn),
        el("div", { class: "scored" },
          el("span", {}, "turn reward ", el("b", {}, fmt.number(turn.reward, 3))),
          turn.trained && el("span", {}, "advantage ", el("b", {}, fmt.signed(turn.advantage))),
          turn.finish === "length" && el("span", { class: "cut" }, "cut by the token budget"),
          turn.sampling?.temperature != null && el("span", {}, "sampled at temperature ", el("b", {}, fmt.number(turn.sampling.temperature, 3))),
          turn.stop != null && el("span", {}, "ended by ", el("b", {}, JSON.stringify(turn.stop))),
          !learned(turn) && el("span", {}, "no loss")))));
}

const learned = (turn) => turn.learned;

// Pixels of the longer side to which small images are enlarged, and to which large ones are reduced.
const ROOM = { small: [32, 40], message: [72, 320], film: [256, 384] };

// The image of a placeholder, a message or a film. Small images are enlarged without smoothing.
function picture(hash, { room = "message", place = null } = {}) {
  const image = DATA.images[hash];
  if (!image) {
    return el("span", { class: "lost" }, hash ? `image ${hash.slice(0, 8)}… is missing in images/` : "an image that is not in the prompt");
  }
  const size = Math.max(image.width, image.height);
  const [enlarged, reduced] = ROOM[room];
  const zoom = size < 96 || size <= enlarged / 2 ? Math.max(1, Math.floor(enlarged / size)) : Math.min(1, reduced / size);
  const made = el("img", {
    src: image.src, alt: `image ${hash.slice(0, 8)}, ${image.width} × ${image.height} pixels`,
    class: size < 96 || zoom > 1 ? "pixels" : "", data: { hash },
    style: { width: `${Math.round(image.width * zoom)}px`, height: `${Math.round(image.height * zoom)}px` },
    title: [`${image.width} × ${image.height} pixels`, place && `${place[1]} token${place[1] > 1 ? "s" : ""} from position ${place[0]}`,
      `images/${hash}.png`, !image.whole && "reduced in size; the file has all pixels"].filter(Boolean).join("\n"),
  });
  return made;
}

// Seconds under a frame.
const seconds = (time) => `${fmt.number(time, 4)} s`;

// The filmstrip of a video: its frames side by side, with the time of each under it. `places` of its tokens, as of `picture`.
function filmstrip(hash, { room = "message", place = null } = {}) {
  const video = DATA.videos[hash];
  if (!video) return el("span", { class: "lost" }, "a video that is not in the prompt");
  const count = video.frames.length;
  const size = [`${count} frames, ${fmt.number(video.fps, 3)} a second`, place && `${tokensOf(place)} tokens from position ${place[0]}`]
    .filter(Boolean).join("\n");
  return el("span", { class: `filmstrip ${room}`, title: size, data: { hash } },
    video.shown.map((at) => el("span", { class: "still" }, picture(video.frames[at], { room: "small" }), el("small", {}, seconds(video.times[at])))),
    count > video.shown.length && el("small", { class: "muted" }, `${video.shown.length} of ${count} frames`));
}

// The videos of a rollout as rollouts/ has them: by hash, in the order in which they are shown.
function videosOf({ run, turns }) {
  const parts = turns.flatMap((turn) => run.messages[turn.messages]).flatMap((message) => message.content);
  const hashes = parts.filter((part) => part.type === "video" && part.hash).map((part) => part.hash);
  return Object.fromEntries(hashes.map((hash) => {
    const { frames, times, fps, tensors } = DATA.videos[hash];
    return [hash, { frames, times, fps, tensors }];
  }));
}

// Tokens of a placeholder that get a feature: all but its gaps.
const tokensOf = ([, length, , gaps]) => (gaps ?? []).reduce((features, [, tokens]) => features - tokens, length);

// What a placeholder shows.
const shownAt = (place, options) => (DATA.videos[place[2]] ? filmstrip : picture)(place[2], { ...options, place });

function messages(run, turn) {
  const places = run.prompts[turn.prompt].placeholders;
  const said = run.messages[turn.messages];
  const count = said.flatMap((message) => message.content).filter((part) => part.type !== "text").length;
  const own = places.slice(places.length - count);
  let next = 0;
  return said.map((message) => el("div", { class: `message ${message.role}` },
    el("div", { class: "role" }, message.role),
    el("div", { class: "said" }, message.content.map((part) => {
      if (part.type === "text") return el("span", { class: "text" }, part.text);
      const place = count === own.length ? own[next++] : null;
      return (part.type === "video" ? filmstrip : picture)(part.hash, { place });
    }))));
}

function promptTokens(run, turn) {
  const prompt = run.prompts[turn.prompt];
  const made = [];
  let t = 0;
  const places = [...prompt.placeholders];
  while (t < prompt.count) {
    const [offset, length, hash] = places[0] ?? [];
    if (offset === turn.offset + t) {
      const place = places.shift();
      made.push(el("span", { class: `placeholder${DATA.videos[hash] ? " video" : ""}` }, shownAt(place, { room: "small" }),
        el("small", {}, `${spell(run, run.columns.prompts[prompt.at + t])} × ${tokensOf(place)}`)));
      t += length;
      continue;
    }
    const id = run.columns.prompts[prompt.at + t];
    const token = piece(spell(run, id), "prompt");
    Object.assign(token.dataset, { id, position: turn.offset + t });
    made.push(token);
    t += 1;
  }
  return el("div", { class: "message prompt" },
    el("div", { class: "role" }, "prompt", turn.offset > 0 && el("small", {}, `from ${turn.offset}`)),
    el("div", { class: "said tokens" }, made));
}

function piece(text, kind) {
  const special = isSpecial(text);
  const shown = special ? text : text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥");
  return el("span", { class: `token ${kind}${special ? " special" : ""}` }, shown);
}

function completion(rollout, turn) {
  const c = rollout.run.columns;
  const box = el("div", { class: "tokens" });
  for (let i = 0; i < turn.count; i++) {
    const token = piece(spell(rollout.run, c.ids[turn.at + i]), learned(turn) ? "sampled loss" : "sampled");
    token.tabIndex = -1;
    token.source = { rollout, turn, t: turn.at + i, position: promptLength(rollout.run, turn) + i };
    box.append(token);
  }
  if (box.firstChild) box.firstChild.tabIndex = 0;
  return box;
}

// ── tint ────────────────────────────────────────────────────────────────────────────────────────────────────

function paint() {
  const tint = TINTS[state.tint];
  const tokens = [...view.detail.querySelectorAll(".sampled")];
  const values = tokens.map(({ source: { rollout, turn, t } }) => (tint ? tint.of(rollout.run.columns, t, turn) : NaN));
  const distinct = tint?.distinct ? [...new Set(values)].sort((a, b) => a - b) : [];
  const scale = tint && !tint.distinct ? scaleOf(state.tint) : 0;
  tokens.forEach((token, i) => {
    const value = values[i];
    let [colour, strength] = ["none", 0];
    if (!Number.isNaN(value) && tint) {
      if (tint.distinct) [colour, strength] = [paletteName(distinct.indexOf(value)), 0.55];
      else {
        strength = scale ? Math.min(1, Math.abs(value) / scale) : 0;
        colour = tint.diverging ? (value < 0 ? "--below" : "--above") : "--much";
      }
    }
    token.dataset.value = value;
    token.style.setProperty("--tint", colour === "none" ? "transparent" : `var(${colour})`);
    token.style.setProperty("--strength", `${Math.round(strength * 100)}%`);
  });
  view.scale.replaceChildren(...scaleLegend(tint, scale, distinct, values));
}

function scaleLegend(tint, scale, distinct, values) {
  if (!tint) return [];
  if (values.every(Number.isNaN)) return [el("span", { class: "muted" }, values.length ? tint.none : "")];
  if (tint.distinct) {
    return distinct.slice(0, 12).map((version, i) =>
      el("span", { class: "key" }, el("i", { style: { background: `var(${paletteName(i)})` } }), fmt.count(version)));
  }
  const unit = tint.unit ? ` ${tint.unit}` : "";
  const ends = tint.diverging ? [`${MINUS}${fmt.number(scale, 2)}`, `+${fmt.number(scale, 2)}${unit}`] : ["0", `${fmt.number(scale, 2)}${unit}`];
  const rounding = state.tint === "gap" && scale < 1e-4;
  return [el("span", {}, ends[0]), el("i", { class: `bar ${tint.diverging ? "diverging" : "sequential"}` }), el("span", {}, ends[1]),
    el("span", { class: "muted wide" }, rounding ? "(rounding)" : "")];
}

function legend() {
  return [
    segmented("Colour tokens by", [...Object.entries(TINTS).map(([name, tint]) => [name, tint.label, tint.title]), ["", "none", "No colour"]],
      state.tint, (name) => {
        state.tint = name;
        paint();
        remember("tint", name);
        keepPlace();
      }),
    (view.scale = el("div", { class: "scale", "aria-live": "polite" })),
    el("span", { class: "key muted", title: "Loss mask: tokens that this step was trained on" }, el("u", {}, "abc"), "trained on"),
    el("span", { class: "push switches" },
      toggle("tokens", "Tokens", "Prompts token by token, with their placeholders (m)"),
      toggle("siblings", SEVERAL ? "Side by side" : "Siblings", "All rollouts of the problem, side by side (g)")),
  ];
}

function toggle(name, label, title) {
  return button(label, title, () => flip(name), { "aria-pressed": String(state[name]), class: "toggle", data: { toggle: name } });
}

function flip(name) {
  state[name] = !state[name];
  const focused = view.legend.contains(document.activeElement);
  draw();
  keepPlace();
  if (focused) view.legend.querySelector(`[data-toggle=${name}]`).focus({ preventScroll: true });
}

// The tooltip of a token.
function tell(token) {
  const tip = document.getElementById("tip");
  const { rollout, turn, t, position } = token.source ?? {};
  const rows = [];
  if (token.source) {
    const c = rollout.run.columns;
    const gap = c.trainer[t] - c.engine[t];
    rows.push(
      ["token", `${JSON.stringify(spell(rollout.run, c.ids[t]))}  ${c.ids[t]}`],
      ["position", fmt.count(position)],
      ["probability", fmt.number(Math.exp(c.engine[t]), 4)],
      ["engine logprob", fmt.number(c.engine[t], 6)],
      ["trainer logprob", Number.isNaN(c.trainer[t]) ? "–" : fmt.number(c.trainer[t], 6)],
      ["gap", Number.isNaN(gap) ? "–" : `${fmt.signed(gap)} nats`],
      ["entropy", Number.isNaN(c.entropy[t]) ? "–" : `${fmt.number(c.entropy[t], 4)} nats`],
      ["advantage", turn.trained ? fmt.signed(turn.advantage) : "–"],
      ["policy version", fmt.count(c.versions[t])],
      ["loss", learned(turn) ? "yes" : "no"],
    );
  } else {
    rows.push(["token", `${JSON.stringify(token.textContent.replaceAll("⏎", ""))}  ${token.dataset.id}`],
      ["position", fmt.count(Number(token.dataset.position))], ["loss", "no (environment token)"]);
  }
  tip.replaceChildren(el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  tip.hidden = false;
  const [spot, box] = [token.getBoundingClientRect(), tip.getBoundingClientRect()];
  const left = Math.max(8, Math.min(spot.left, innerWidth - box.width - 8));
  const below = spot.bottom + 6 + box.height < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? spot.bottom + 6 : Math.max(8, spot.top - box.height - 6)}px`;
}

const silence = () => (document.getElementById("tip").hidden = true);

// ── siblings side by side ───────────────────────────────────────────────────────────────────────────────────

function siblings(rollout) {
  const here = rollout.of.rollouts.filter((other) => matching.has(other));
  const opening = here.find((other) => other.turns.length);
  const same = here.every((other) => !other.turns.length
    || JSON.stringify(other.run.messages[other.turns[0].messages]) === JSON.stringify(opening.run.messages[opening.turns[0].messages]));
  const head = [
    el("div", { class: "title" }, el("h2", {}, rollout.problem),
      el("span", { class: "muted" }, SEVERAL ? `${here.length} rollouts`
        : rollout.split === "train" ? `step ${fmt.count(rollout.step)}, ${here.length} siblings`
          : `held-out, ${new Set(here.map((other) => other.step)).size} evaluations`)),
    opening && same && el("article", { class: "turn" },
      state.tokens ? promptTokens(opening.run, opening.turns[0]) : messages(opening.run, opening.turns[0])),
  ].filter(Boolean);
  const order = (rollouts) => [...rollouts].sort((a, b) => b.reward - a.reward || a.index - b.index);
  if (!SEVERAL && rollout.split === "train") return [...head, el("div", { class: "cards" }, order(here).map((other) => card(other, same)))];
  const steps = [...new Set(here.map((other) => other.step))].sort((a, b) => b - a);
  return [...head, el("div", { class: "versus", style: { "--runs": RUNS.length } },
    SEVERAL && RUNS.map((run) => el("h3", {}, el("i", { class: "dot", style: { background: `var(${paletteName(run.index)})` } }), NAMES[run.index])),
    steps.flatMap((step) => [
      el("h4", {}, `step ${fmt.count(step)}`),
      ...RUNS.map((run) => el("div", { class: "cards" },
        order(here.filter((other) => other.run === run && other.step === step)).map((other) => card(other, same)))),
    ]))];
}

const LABELS = { eval_sampled: "sampled", eval_greedy: "greedy" };

function card(rollout, openingShown) {
  const made = el("article", { class: `card${rollout === state.chosen ? " chosen" : ""}${rollout.dropped ? " dropped" : ""}` },
    el("header", {},
      button(LABELS[splitOf(rollout)] ?? String(rollout.index).padStart(2, "0"), `Open ${rollout.id}`, () => {
        state.siblings = false;
        show(rollout);
      }, { class: "open" }),
      el("b", {}, fmt.number(rollout.reward, 3)),
      rollout.stop !== "terminated" && el("span", { class: "tag" }, rollout.stop),
      rollout.dropped && el("span", { class: "tag bad" }, `dropped: ${rollout.dropped}`)),
    rollout.error && el("pre", { class: "note bad" }, rollout.error),
    rollout.turns.map((turn, index) => el("div", { class: "cardturn" },
      (index > 0 || !openingShown) && rollout.run.prompts[turn.prompt].placeholders.length > 0 && el("div", { class: "thumbs" },
        rollout.run.prompts[turn.prompt].placeholders.map((place) => shownAt(place, { room: "small" }))),
      completion(rollout, turn),
      rollout.split === "train" && el("small", { class: "muted" }, fmt.signed(turn.advantage)))));
  return made;
}
