// Draws a page from its document alone. codistill.render(document) changes what was drawn before where it differs, so that
// a live page can call it again with a newer document and the reader keeps place, selection and zoom. codistill.now(state)
// draws where a run that goes on stands. All text goes in as text nodes, never as markup.
// When done, <html data-charts> holds the number of charts drawn; <html data-error> holds the first error, if any.
"use strict";

const codistill = (() => {
  const root = document.documentElement;
  const COLOURS = 6;
  const DASHES = [[], [8, 4], [2, 3], [9, 3, 2, 3]];
  const PRINT_WIDTH = { normal: 320, small: 206 };
  const GAP = "\u202f";
  const hidden = new Set(); // names of series that the reader switched off; they stay off in the next document
  const drawnIn = new WeakMap(); // figure -> its chart
  let charts = [];
  let live = false; // whether a server sends newer documents
  let best = new Map(); // participant -> its best test accuracy, and how often its worker was started again

  // ---- text

  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const percent = (value, digits = 2) => (known(value) ? `${(100 * value).toFixed(digits)}${GAP}%` : "–");
  const count = (value) => (known(value) ? new Intl.NumberFormat("en").format(value) : "–");
  const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));

  function nats(value) {
    return known(value) ? (Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(2) : value.toFixed(3)) : "–";
  }

  function signed(value, digits = 2) {
    if (!known(value)) return "–";
    const text = Math.abs(100 * value).toFixed(digits);
    return Number(text) === 0 ? text : (value > 0 ? "+" : "−") + text;
  }

  function seconds(value, digits = (number) => number.toPrecision(3)) {
    if (!known(value)) return "–";
    if (value === 0) return `0${GAP}s`;
    if (value < 0.9995e-3) return `${digits(1e6 * value)}${GAP}µs`;
    if (value < 0.9995) return `${digits(1e3 * value)}${GAP}ms`;
    if (value < 99.95) return `${digits(value)}${GAP}s`;
    const whole = Math.round(value);
    const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
    return hours ? `${count(hours)}${GAP}h ${minutes}${GAP}min` : `${minutes}${GAP}min ${rest}${GAP}s`;
  }

  function clock(value) {
    const whole = Math.max(0, Math.floor(value));
    return [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60].map((part) => String(part).padStart(2, "0")).join(":");
  }

  const shownKind = (what) => what.replaceAll("_", " ");
  const modelOf = (participant) => (participant.role === "teacher" ? `${participant.model} (teacher)` : participant.model);

  const moment = (value) => (known(value) ? `${new Date(1000 * value).toISOString().slice(0, 19).replace("T", " ")} UTC` : "–");

  function list(words) {
    return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words[words.length - 1]}`;
  }

  // ---- elements

  function h(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "style") for (const [property, setting] of Object.entries(value)) element.style.setProperty(property, setting);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  const look = (number) => ({ colour: `--c${number % COLOURS}`, dash: DASHES[Math.floor(number / COLOURS) % DASHES.length] });
  const ink = (dash = []) => ({ colour: "--ink", dash });

  function swatch({ colour, dash, over }, width = 2.5) {
    const make = (name, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      return element;
    };
    const svg = make("svg", { class: "swatch", viewBox: "0 0 22 10", "aria-hidden": "true" });
    const line = (name, pattern) => {
      const path = make("path", { d: "M0 5H22", "stroke-width": width, "stroke-dasharray": pattern.join(" "), fill: "none" });
      path.style.stroke = `var(${name})`;
      return path;
    };
    svg.append(line(colour, dash), ...(over ? [line(over, [5, 5])] : []));
    return svg;
  }

  const empty = (sentence) => h("p", { class: "empty" }, sentence);
  const cell = (text, attributes) => h("td", { class: "number", ...attributes }, text);
  const head = (text, attributes) => h("th", { scope: "col", ...attributes }, text);

  function table(id, caption, heads, rows, tall = false) {
    const label = `${id}-caption`; // outside what scrolls, so that it is read whole on a narrow screen
    return h("div", { class: "table" }, h("p", { class: "note", id: label }, caption),
      h("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-labelledby": label },
        h("table", { id, "aria-labelledby": label }, h("thead", {}, heads), h("tbody", {}, rows))));
  }

  const tile = (value, label, first = false) => h("div", { class: first ? "tile first" : "tile" }, h("b", {}, value), h("span", {}, label));

  function facts(pairs) {
    return h("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([term, value, wide]) => h("div", { class: wide ? "wide" : null }, h("dt", {}, term), h("dd", {}, value))));
  }

  // ---- charts

  // The decimals that tell multiples of a step apart: 2.5 needs one, though it is above 1.
  function decimals(step) {
    for (let digits = 0; digits < 6; digits += 1) {
      const scaled = step * 10 ** digits;
      if (Math.abs(scaled - Math.round(scaled)) < 1e-6 * scaled) return digits;
    }
    return 6;
  }

  const AXES = {
    share: {
      text: (value) => percent(value),
      ticks: (splits, step) => splits.map((value) => (100 * value).toFixed(decimals(100 * step))),
      range: (low, high) => {
        const pad = Math.max((high - low) * 0.06, 0.005);
        return [Math.max(0, low - pad), Math.min(1, high + pad)];
      },
    },
    nats: { text: nats, ticks: (splits) => splits.map((value) => trimmed(value, 3)), log: true },
    time: { text: seconds, ticks: (splits) => splits.map((value) => seconds(value, (number) => trimmed(number, 3))), log: true },
    duration: {
      text: seconds,
      ticks: (splits) => splits.map((value) => seconds(value, (number) => trimmed(number, 3))),
      range: (low, high) => [0, high > 0 ? 1.08 * high : 1],
    },
  };

  // Round numbers that lie on the axis; more of each decade the fewer decades there are.
  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const factors = decades > 2.6 ? [1] : decades > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
      for (const factor of factors) {
        const tick = Number(`${factor}e${power}`);
        if (tick >= low && tick <= high) ticks.push(tick);
      }
    return ticks.length ? ticks : [low, high];
  }

  const paint = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // A figure with one chart. spec: title, x ("epoch" or "step"), y (label), axis (a name in AXES), series (name, look,
  // x, y and optionally low, high, width), note, small, ranges ({x, y}), nothing (the sentence in place of an empty chart).
  function chart(spec) {
    const axis = AXES[spec.axis];
    const usable = (value) => known(value) && (!axis.log || value > 0);
    const series = spec.series
      .map((each) => ({ ...each, y: each.y.map((value) => (usable(value) ? value : null)) }))
      .filter((each) => each.y.some(known));
    const title = h("h3", {}, spec.title);
    if (!series.length) return h("figure", {}, title, empty(spec.nothing));

    const last = (each) => {
      for (let index = each.y.length - 1; index >= 0; index -= 1) if (known(each.y[index])) return index;
      return 0;
    };
    const plot = h("div", { class: "plot", role: "img",
      "aria-label": `${spec.title}, against the ${spec.x}. ` + series.map((each) =>
        `${each.name}: ${axis.text(each.y[last(each)])} at ${spec.x} ${trimmed(each.x[last(each)], 6)}`).join("; ") });
    const at = h("li", { class: "at" }, `last ${spec.x}`);
    const entries = series.map((each) => {
      const value = h("output", {}, axis.text(each.y[last(each)]));
      const button = h("button", { type: "button", "aria-pressed": String(!hidden.has(each.name)), title: "Show or hide" },
        swatch(each.look, each.width), h("span", {}, each.name), value);
      button.addEventListener("click", () => toggle(each.name));
      return { name: each.name, value, button, final: axis.text(each.y[last(each)]) };
    });
    const figure = h("figure", {}, title, plot, h("ul", { class: entries.length > 6 ? "legend many" : "legend" }, at, entries.map((entry) => h("li", {}, entry.button))),
      spec.note ? h("figcaption", {}, spec.note) : null);
    const item = { figure, spec, axis, series, plot, at, entries, drawn: null, width: 0 };
    charts.push(item);
    drawnIn.set(figure, item);
    return figure;
  }

  function toggle(name) {
    if (!hidden.delete(name)) hidden.add(name);
    for (const each of charts) {
      for (const entry of each.entries) entry.button.setAttribute("aria-pressed", String(!hidden.has(entry.name)));
      each.drawn.series.forEach((line, index) => {
        if (index && line.owner === name) each.drawn.setSeries(index, { show: !hidden.has(name) });
      });
    }
  }

  // What uPlot is given: of each line its numbers, bands' edges included, in the order in which draw() adds lines.
  const joined = (series) => uPlot.join(series.flatMap((each) => [
    ...(each.low && each.low.some(known) ? [[each.x, each.high], [each.x, each.low]] : []),
    [each.x, each.y],
    ...(each.look.over ? [[each.x, each.y]] : []),
  ]));

  // Whether a chart can show another's numbers: the same lines on the same axes.
  const alike = (one, other) => one.spec.title === other.spec.title && one.spec.x === other.spec.x && one.series.length === other.series.length
    && one.series.every((each, index) => each.name === other.series[index].name && !each.low && !other.series[index].low);

  function refresh(item, newer) {
    const { scales, data } = item.drawn;
    const zoomed = data[0].length > 0 && (scales.x.min > data[0][0] || scales.x.max < data[0][data[0].length - 1]);
    item.series = newer.series;
    item.entries.forEach((entry, index) => { entry.final = newer.entries[index].final; });
    item.plot.setAttribute("aria-label", newer.plot.getAttribute("aria-label"));
    item.drawn.setData(joined(item.series), !zoomed);
    if (zoomed) item.drawn.redraw();
    item.update(item.drawn);
    const [before, after] = [item, newer].map(({ figure }) => figure.querySelector("figcaption"));
    if (before && after) before.textContent = after.textContent;
    else if (after) item.figure.append(after);
    else if (before) before.remove();
  }

  function draw(item) {
    const { spec, axis, series, plot, at, entries } = item;
    const printing = root.hasAttribute("data-print");
    const width = printing ? PRINT_WIDTH[spec.small ? "small" : "normal"] : plot.clientWidth;
    const height = spec.small ? 210 : 270;
    const lines = [{}];
    const bands = [];
    const shown = []; // index of each entry's line
    const add = (each, options) => lines.push({ owner: each.name, label: each.name, show: !hidden.has(each.name), spanGaps: true, ...options }) - 1;
    for (const each of series) {
      const colour = paint(each.look.colour);
      if (each.low && each.low.some(known)) {
        const edge = { stroke: "transparent", width: 0, points: { show: false } };
        const high = add(each, edge);
        const low = add(each, edge);
        bands.push({ series: [high, low], fill: `color-mix(in srgb, ${colour} 20%, transparent)` });
      }
      const options = { stroke: colour, width: each.width || 2, dash: each.look.dash, points: { size: 5, fill: colour, show: each.points } };
      shown.push(add(each, options));
      if (each.look.over) add(each, { ...options, stroke: paint(each.look.over), dash: [7, 7], points: { show: false } });
    }
    const range = axis.log
      ? (_, low, high) => (known(low) && known(high) ? [low / 1.15, high * 1.15] : [0.1, 1])
      : (_, low, high) => (known(low) && known(high) ? axis.range(low, high) : [0, 1]);
    const font = "12px ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif";
    const lineOf = (label, size, more) => ({
      label, labelFont: font, labelSize: 20, labelGap: 2, font, size, stroke: paint("--soft"),
      grid: { stroke: paint("--line"), width: 1 }, ticks: { stroke: paint("--line"), width: 1, size: 5 }, ...more,
    });
    const update = (u) => {
      const index = u.cursor.idx;
      const inside = index !== null && index !== undefined && u.cursor.left >= 0;
      at.textContent = inside ? `${spec.x} ${trimmed(u.data[0][index], 6)}` : `last ${spec.x}`;
      entries.forEach((entry, number) => {
        entry.value.textContent = inside ? axis.text(u.data[shown[number]][index]) : entry.final;
      });
    };
    plot.replaceChildren();
    item.update = update;
    item.width = width;
    item.drawn = new uPlot({
      width, height, legend: { show: false }, series: lines, bands,
      padding: [10, 18, 0, 0],
      focus: { alpha: 0.35 },
      cursor: { focus: { prox: series.length > 1 ? 14 : -1 }, sync: { key: `codistill-${spec.x}`, scales: ["x", null] }, y: false },
      scales: {
        x: { time: false, range: spec.ranges ? () => spec.ranges.x : (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { distr: axis.log ? 3 : 1, range: spec.ranges ? () => spec.ranges.y : range },
      },
      axes: [
        lineOf(spec.x, 32, { space: 60, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e7, 1e8, 1e9] }),
        lineOf(spec.y, spec.axis === "share" ? 40 : 58, {
          values: (_, splits, __, ___, step) => axis.ticks(splits, step),
          ...(axis.log ? { splits: (_, __, low, high) => logTicks(low, high), filter: (_, splits) => splits } : { space: 36 }),
        }),
      ],
      hooks: { setCursor: [update] },
    }, joined(series), plot);
  }

  function redraw() {
    for (const item of charts) {
      if (item.drawn) item.drawn.destroy();
      draw(item);
    }
  }

  function resize() {
    for (const item of charts) {
      const width = item.plot.clientWidth;
      if (item.drawn && width && width !== item.width) {
        item.width = width;
        item.drawn.setSize({ width, height: item.drawn.height });
      }
    }
  }

  // ---- a run

  function run(data) {
    const { run: about, participants, rounds, events } = data;
    const students = onlyStudents(participants);
    const together = about.exchanges ? `together, by ${about.method}` : `each alone (${about.method})`;
    const versions = Object.entries(about.versions).map(([name, version]) => `${name} ${version}`).join(" · ");
    const behind = students.filter((student) => !student.final);
    const summary = [
      runTiles(data),
      participantTable(participants),
      facts([
        ["Begun", about.created ? moment(Date.parse(about.created) / 1000) : known(about.started) ? moment(about.started) : null],
        ["First record to last", known(about.seconds) ? seconds(about.seconds) : null],
        ["Training samples", about.train_size === null ? "all of the training split" : `${count(about.train_size)} chosen by the experiment`],
        ["Optimiser", `${about.optimizer}, learning rate ${about.lr}, schedule ${about.schedule}`],
        ["Steps of each student", count(about.total_steps)],
        ["Rounds", about.exchanges ? count(about.total_rounds) : null],
        ["Started again", times([["the server", about.server_restarts], ...participants.map(({ name, restarts }) => [name, restarts])])],
        ["Joined again", times(participants.map(({ name, joins }) => [name, joins - 1]))],
        ["How", { grpc: "worker processes over gRPC", "in-process": "all participants in one process" }[about.mode]],
        ["Versions", versions],
        ["Machine", Object.entries(about.machine).map(([name, value]) => `${name}: ${value}`).join(" · "), true],
        ["Command", about.command.length ? h("code", {}, about.command.join(" ")) : null, true],
      ]),
    ];
    const drawn = [
      h("h2", {}, "Learning curves"),
      h("p", { class: "note hint" }, "Point at a chart to read every participant’s value there; choose a name to hide or show it; drag to zoom, double-click to zoom out."),
      curves(participants, rounds, about),
    ];
    const going = live && behind.length > 0; // then the curves come first: what else is of interest stands above them
    return [
      h("header", {}, h("p", { class: "kicker" }, "codistill · run"), h("h1", {}, data.title),
        h("p", { class: "lede" }, `${plural(students.length, "student")} ${students.length === 1 ? "learns" : "learn"} `, h("b", {}, about.dataset),
          `${about.exchanges || students.length === 1 ? " " : ", "}${students.length === 1 && !about.exchanges ? `alone (${about.method})` : together}: ${plural(about.epochs, "epoch")} in batches of ${count(about.batch_size)}, seed ${about.seed}.`)),
      live ? h("section", { id: "now" }) : null,
      behind.length && !live ? h("div", { class: "warning", role: "status" }, `Not complete: ${list(behind.map((student) =>
        `${student.name} ${student.latest ? `was last tested at epoch ${trimmed(student.latest.epochs_trained, 4)}` : "has not been tested"}`))}; the last epoch is ${count(about.epochs)}.`) : null,
      ...(going ? [...drawn, h("h2", {}, "So far"), ...summary] : [...summary, ...drawn]),
      h("h2", {}, "Waiting"),
      waiting(data),
      h("h2", {}, "Disagreement"),
      disagreement(participants, data.disagreement, about),
      h("h2", {}, "Events"),
      eventTable(events),
    ];
  }

  const onlyStudents = (participants) => participants.filter((participant) => participant.role === "student");

  function times(counted) {
    const some = counted.filter(([, number]) => number > 0);
    return some.length ? list(some.map(([name, number]) => `${name} ${number === 1 ? "once" : plural(number, "time")}`)) : null;
  }

  function runTiles({ run: about, participants, complete }) {
    const students = onlyStudents(participants);
    const measured = students.filter((student) => student.latest && known(student.latest.accuracy));
    const tiles = [];
    if (measured.length) {
      const mean = measured.reduce((sum, student) => sum + student.latest.accuracy, 0) / measured.length;
      const best = measured.reduce((left, right) => (right.latest.accuracy > left.latest.accuracy ? right : left));
      const when = complete ? "after the last epoch" : "at the latest test so far";
      const whom = measured.length === students.length ? plural(students.length, "student") : `${measured.length} of ${students.length} students`;
      tiles.push(tile(percent(mean), students.length === 1 ? `test accuracy ${when}` : `test accuracy ${when}, mean of ${whom}`, true));
      if (measured.length > 1) tiles.push(tile(percent(best.latest.accuracy), `the highest of them, ${best.name}`));
    }
    if (known(about.ensemble_accuracy)) tiles.push(tile(percent(about.ensemble_accuracy), "accuracy of the ensemble (the mean of the students’ probabilities) on training samples, over the last epoch"));
    if (known(about.median_wait)) tiles.push(tile(seconds(about.median_wait), `median wait in a round, first contribution to last; longest ${seconds(about.longest_wait)}`));
    if (known(about.seconds)) tiles.push(tile(seconds(about.seconds), about.closed_rounds ? `first record to last, ${plural(about.closed_rounds, "round")} closed` : "first record to last"));
    return tiles.length ? h("div", { class: "tiles" }, tiles) : empty("Nothing has been measured yet.");
  }

  function participantTable(participants) {
    return table("participants", "Participants. Students are tested after the last epoch (not the best one); where training did not get there, at the latest test.",
      h("tr", {}, head("Participant"), head("Model"), head("Parameters", { class: "number" }), head("Device"), head("Test accuracy", { class: "number" }),
        head("Cross-entropy, nats", { class: "number" }), head("Epochs", { class: "number" }), head("Best test accuracy", { class: "number" })),
      participants.map((participant, number) => {
        const point = participant.final || participant.latest;
        return h("tr", {}, h("th", { scope: "row" }, swatch(look(number)), participant.name), h("td", {}, modelOf(participant)), cell(count(participant.parameters)),
          h("td", {}, participant.device || "–"),
          cell([point ? percent(point.accuracy) : "–", point && known(point.accuracy) ? h("span", { class: "meter", "aria-hidden": "true" }, h("i", { style: { width: `${100 * point.accuracy}%`, background: `var(${look(number).colour})` } })) : ""]),
          cell(point ? nats(point.loss) : "–"), cell(point ? trimmed(point.epochs_trained, 6) : "–"),
          cell(participant.best ? [percent(participant.best.accuracy), h("span", { class: "spread" }, ` at ${trimmed(participant.best.epochs_trained, 6)}`)] : "–"));
      }));
  }

  function curves(participants, rounds, about) {
    const of = (split, column) => participants.map((participant, number) => ({ name: participant.name, look: look(number), x: participant[split].epochs_trained, y: participant[split][column] }));
    const ensemble = { name: "ensemble", look: ink(), width: 2.5, x: rounds.ensemble.position, y: rounds.ensemble.accuracy, points: false };
    const thinned = (split) => {
      const longest = participants.reduce((most, participant) => (participant[split].count > most.count ? participant[split] : most), { count: 0, epochs_trained: [] });
      return longest.count > longest.epochs_trained.length ? `${longest.epochs_trained.length} of ${count(longest.count)} measurements are drawn, evenly spaced, the last among them.` : null;
    };
    const figures = [
      chart({ title: "Test accuracy", x: "epoch", y: "test accuracy, %", axis: "share", series: of("test", "accuracy"), note: thinned("test"), nothing: "No participant has been tested yet." }),
      chart({ title: "Test cross-entropy (log-loss)", x: "epoch", y: "nats, log scale", axis: "nats", series: of("test", "loss"), nothing: "No participant has been tested yet." }),
      chart({ title: "Training accuracy", x: "epoch", y: "training accuracy, %", axis: "share",
        series: of("train", "accuracy"), nothing: "No training accuracy is recorded.",
        note: thinned("train") }),
      chart({ title: "Training cross-entropy", x: "epoch", y: "nats, log scale", axis: "nats", series: of("train", "loss"), nothing: "No training loss is recorded." }),
    ];
    if (about.exchanges) {
      figures.push(chart({ title: "Distillation loss", x: "epoch", y: "nats, log scale", axis: "nats", series: of("train", "distillation_loss"), note: "The method’s term, its weight included.", nothing: "No distillation loss is recorded." }));
      figures.push(chart({ title: "Ensemble accuracy", x: rounds.x, y: "ensemble accuracy, %", axis: "share", series: [ensemble], note: "Share of training samples that the mean of the students’ probabilities classifies correctly. Each point is the mean over the epoch before it.", nothing: "No ensemble accuracy is recorded." }));
    }
    return h("div", { class: "charts" }, figures);
  }

  function waiting({ run: about, participants, rounds }) {
    const paced = participants.some((participant) => known(participant.step_seconds));
    if (!about.exchanges && !paced) return empty(`With ${about.method} nothing is exchanged, so nobody waits; no step times are recorded.`);
    if (about.exchanges && !paced && !rounds.spans) return empty("No closed round and no step time is recorded.");
    const slowest = Math.max(...participants.map((participant) => participant.step_seconds || 0));
    const parts = ({ step_seconds: step, wait_seconds: wait }, number) => (known(step) ? h("div", { class: "parts", "aria-hidden": "true" },
      h("i", { style: { width: `${(100 * Math.max(step - wait, 0)) / slowest}%`, background: `var(${look(number).colour})` } }),
      wait > 0 ? h("i", { class: "waiting", style: { width: `${(100 * Math.min(wait, step)) / slowest}%` } }) : "") : "–");
    const closed = rounds.spans > 0;
    const missed = participants.some((participant) => participant.missed_rounds > 0);
    const rows = participants.map((participant, number) => h("tr", {}, h("th", { scope: "row" }, swatch(look(number)), participant.name),
      cell(seconds(participant.step_seconds)),
      about.exchanges ? cell(seconds(participant.wait_seconds)) : null,
      h("td", {}, parts(participant, number)),
      closed ? cell(`${count(participant.last_to_contribute)} (${percent(participant.last_to_contribute / about.closed_rounds, 1)})`) : null,
      closed ? cell(seconds(participant.waited_for_seconds)) : null,
      missed ? cell(`${count(participant.missed_rounds)} (${percent(participant.missed_rounds / about.closed_rounds, 1)})`) : null));
    const heads = h("tr", {}, head("Participant"), head("Step time, median", { class: "number" }),
      about.exchanges ? head("of it waiting", { class: "number" }) : null, head(about.exchanges ? "Working, and waiting (hatched)" : "Working"),
      closed ? head("Last to contribute, rounds", { class: "number" }) : null, closed ? head("Others waited for it", { class: "number" }) : null,
      missed ? head("Missed, rounds", { class: "number" }) : null);
    const caption = about.exchanges
      ? "Medians over the participant’s reports. A participant is waited for while it is the only one whose contribution to a round is missing." + (missed ? " A round that closed without a participant is one that it missed." : "")
      : `Medians over the participant’s reports. With ${about.method} nothing is exchanged, so nobody waits.`;
    const block = [table("waits", caption, heads, rows)];
    if (closed) {
      const columns = rounds.position;
      const merged = rounds.spans > columns.length ? ` ${count(rounds.spans)} records are merged into ${columns.length} points; no maximum is lost.` : "";
      block.push(h("p", {}, `Over ${plural(about.closed_rounds, "closed round")}, the median time from the first contribution to the last was ${seconds(about.median_wait)}; the longest was ${seconds(about.longest_wait)}.`),
        about.rounds_without_targets ? h("p", {}, `${plural(about.rounds_without_targets, "round")} closed below the quorum and had no targets: whoever was there learned from the labels alone.`) : "",
        h("div", { class: "charts" },
          chart({ title: "Wait in a round, first contribution to last", x: rounds.x, y: "time, log scale", axis: "time", nothing: "No wait is recorded.",
            note: `Each point is a span of rounds that ends there.${merged}`,
            series: [{ name: "median", look: ink(), x: columns, y: rounds.median, points: false }, { name: "longest", look: { colour: "--soft", dash: [3, 3] }, x: columns, y: rounds.longest, points: false, width: 1.5 }] }),
          chart({ title: "Who was waited for", x: rounds.x, y: "time per round", axis: "duration", nothing: "No wait is recorded.",
            note: "Mean over each span of the time for which the participant was the only one missing.",
            series: participants.map(({ name }, number) => ({ name, look: look(number), x: columns, y: rounds.waited_for[name], points: false })) })));
    } else if (about.exchanges) block.push(empty("No closed round is recorded, so there is nothing to say about waits in rounds."));
    return h("div", {}, block);
  }

  function disagreement(participants, { pairs, lines, x }, about) {
    if (!pairs.length) return empty(about.exchanges ? "No disagreement between students is recorded." : `With ${about.method} nothing is exchanged, so students’ predictions are not compared.`);
    const looks = new Map(participants.map(({ name }, number) => [name, look(number)]));
    const ratio = new Map(pairs.flatMap((pair) => [[`${pair.first}|${pair.second}`, pair.latest], [`${pair.second}|${pair.first}`, pair.latest]]));
    const most = Math.max(...pairs.map((pair) => pair.latest || 0), 0.2); // so that a small difference stays pale
    const compared = participants.filter(({ name }) => pairs.some((pair) => pair.first === name || pair.second === name));
    const shade = (value) => ({ background: `rgba(var(--heat), ${((0.55 * value) / most).toFixed(3)})` });
    const rows = compared.map((row) => h("tr", {}, h("th", { scope: "row" }, swatch(looks.get(row.name)), row.name), compared.map((column) => {
      const value = ratio.get(`${row.name}|${column.name}`);
      return known(value) ? h("td", { style: shade(value) }, (100 * value).toFixed(1)) : h("td", {}, "·");
    })));
    const heads = h("tr", {}, h("td", {}), compared.map((student) => head(student.name)));
    const grid = table("disagreement", "Share of training samples on which two students predict different classes, %, over the last epoch.", heads, rows);
    grid.querySelector("table").classList.add("heat");
    const each = lines.every((line) => line.students.length === 2);
    const series = lines.map(({ students: [first, second], position, ratio: y }) => ({
      name: second ? `${first} and ${second}` : first,
      look: second ? { colour: looks.get(first).colour, dash: [], over: looks.get(second).colour } : looks.get(first),
      x: position, y, points: false,
    }));
    const drawn = chart({ title: each ? "Disagreement of pairs" : "Mean disagreement with the others", x, y: "samples, %", axis: "share", series, nothing: "No disagreement is recorded.",
      note: each ? "Each line bears the colours of its two students." : `${count(pairs.length)} pairs are too many to draw; each line is a student’s mean over its pairs.` });
    return compared.length > 5 ? h("div", {}, h("div", { class: "charts" }, drawn), grid) : h("div", { class: "charts" }, drawn, grid);
  }

  function eventTable(events) {
    if (!events.length) return empty("No event is recorded.");
    return table("events", `${plural(events.length, "event")}. Time is counted from the first record; point at it for the date.`,
      h("tr", {}, head("Time"), head("Event"), head("Participant"), head("Message")),
      events.map((event) => h("tr", {}, h("td", { class: "time", title: moment(event.time) }, clock(event.offset)), h("td", {}, h("code", {}, shownKind(event.what))),
        h("td", {}, event.participant || "–"), h("td", { class: "message" }, event.message))), events.length > 14);
  }

  // ---- a comparison

  const spread = (value, text, digits) => (value && known(value.mean)
    ? [text(value.mean), known(value.deviation) ? h("span", { class: "spread" }, ` ± ${(100 * value.deviation).toFixed(digits)}`) : ""] : "–");
  const share = (value) => (100 * value).toFixed(2);

  function comparison(data) {
    const { methods, baseline, seeds, students, settings } = data;
    const others = methods.filter((method) => method !== baseline);
    const several = others.length > 1;
    const versions = settings ? Object.entries(settings.versions).map(([name, version]) => `${name} ${version}`).join(" · ") : "";
    return [
      h("header", {}, h("p", { class: "kicker" }, "codistill · comparison"), h("h1", {}, data.title),
        settings ? h("p", { class: "lede" }, `${plural(students.length, "student")} ${students.length === 1 ? "learns" : "learn"} `, h("b", {}, settings.dataset),
          ` by ${data.many ? plural(methods.length, "method") : list(methods)}, ${seeds.length === 1 ? `with seed ${seeds[0]}` : `each with ${seeds.length} seeds`}: ${plural(settings.epochs, "epoch")} in batches of ${count(settings.batch_size)}.`) : null),
      data.incomplete.length ? h("div", { class: "warning", role: "status", id: "incomplete" },
        `${plural(data.incomplete.length, "run")} of ${data.runs.length} ${data.incomplete.length === 1 ? "is" : "are"} not complete. Students without a test after the last epoch are left out of all means below.`,
        h("ul", {}, data.incomplete.map((each) => h("li", {}, `${each.method}, seed ${each.seed}: ${each.reason}`)))) : null,
      data.many ? rankedTiles(data, others) : comparisonTiles(data, others),
      students.length ? (data.many ? methodTable(data) : gainTable(data, others)) : empty("No run can be read yet."),
      notes(Object.entries(data.left_out).map(([method, reason]) => `${method} was not compared: ${reason}.`)),
      h("p", { class: "note" }, `Accuracy is that of the test after the last epoch, not of the best one. ${baseline ? `A gain is paired: with a method less alone (${baseline}), same student, same seed. ` : `There are no runs of independent, so there is no gain to report. `}${seeds.length > 1 ? "After ± stands the sample standard deviation over seeds." : "One seed has no spread."}`),
      baseline && students.length ? [h("h2", {}, "Gains"), picture(data, several && !data.many)] : null,
      students.length ? [h("h2", {}, baseline && others.length ? "Alone and together" : "Learning curves"), data.many ? chartsByMethod(data) : chartsByStudent(data, others, several)] : null,
      students.length ? [h("h2", {}, "Every seed"), seedTable(data)] : null,
      h("h2", {}, "Runs"),
      runTable(data.runs),
      facts([["Training samples", settings && settings.train_size !== null ? `${count(settings.train_size)} chosen by the experiment` : null],
        ["Teachers", taughtBy(data.runs), true], ["Versions", versions, true]]),
    ].flat(2);
  }

  const notes = (sentences) => sentences.map((sentence) => h("p", { class: "note" }, sentence));

  // By whom the methods with a teacher were taught, where it was not by the generation before.
  function taughtBy(runs) {
    const names = new Map();
    for (const { method, teachers } of runs) if (teachers.length === 1) names.set(teachers[0], (names.get(teachers[0]) || new Set()).add(method));
    return [...names].map(([name, methods]) => `${name} of ${list([...methods])}${name.endsWith(".alone") ? ", the best of the students alone with the same seed" : ""}`).join("; ");
  }

  function comparisonTiles({ means, students, seeds, baseline }, others) {
    const over = (value) => `${students.length > 1 ? `mean of ${students.length} students` : students.map((student) => student.name).join("")}, ${plural(Object.keys(value.values).length, "seed")}`;
    const tiles = others.flatMap((method) => {
      const { accuracy, gain } = means[method];
      if (baseline && gain && known(gain.mean)) return [tile(spread(gain, signed, 2), `percentage points, gain with ${method}: ${over(gain)}`, true)];
      return !baseline && known(accuracy.mean) ? [tile([percent(accuracy.mean)], `test accuracy with ${method}: ${over(accuracy)}`, true)] : [];
    });
    if (baseline && known(means[baseline].accuracy.mean)) tiles.push(tile(percent(means[baseline].accuracy.mean), `test accuracy alone: ${over(means[baseline].accuracy)}`));
    return tiles.length ? h("div", { class: "tiles" }, tiles) : empty("No complete runs to compare yet.");
  }

  // Of many methods the best and the worst, and all in the table.
  function rankedTiles({ means, students, baseline }, others) {
    const value = (method) => (baseline ? means[method].gain : means[method].accuracy);
    const ranked = others.filter((method) => value(method) && known(value(method).mean)).sort((a, b) => value(b).mean - value(a).mean);
    if (!ranked.length) return empty("No complete runs to compare yet.");
    const over = students.length > 1 ? `mean of ${students.length} students` : students.map((student) => student.name).join("");
    const shown = (method, which) => tile(baseline ? spread(value(method), signed, 2) : percent(value(method).mean),
      `${baseline ? "percentage points, " : "test accuracy, "}${which} of ${ranked.length} methods: ${method}, ${over}`, which === "highest");
    return h("div", { class: "tiles" }, shown(ranked[0], "highest"), shown(ranked[ranked.length - 1], "lowest"),
      baseline && known(means[baseline].accuracy.mean) ? tile(percent(means[baseline].accuracy.mean), `test accuracy alone: ${over}`) : null);
  }

  function methodTable({ students, means, methods, baseline }) {
    const all = [...students, ...(students.length > 1 ? [{ name: "Mean", results: means }] : [])];
    const top = h("tr", {}, h("td", {}), all.map((student) => head([student.name, student.parameters ? h("span", { class: "spread" }, ` ${count(student.parameters)}`) : ""], { colspan: baseline ? "2" : "1", scope: "colgroup" })));
    const heads = h("tr", {}, head("Method"), all.flatMap(() => [head("accuracy", { class: "number" }), baseline ? head("gain", { class: "number" }) : null]));
    const rows = methods.map((method) => h("tr", {}, h("th", { scope: "row" }, method), all.flatMap(({ results }) => [
      cell(known(results[method].accuracy.mean) ? share(results[method].accuracy.mean) : "–"),
      baseline ? cell(method === baseline ? "" : spread(results[method].gain, signed, 2), { class: "number gain" }) : null,
    ])));
    return table("gains", "Test accuracy after the last epoch in percent, mean over seeds, and the gain in percentage points; beside each student its parameters.", [top, heads], rows);
  }

  function gainTable({ students, means, methods, baseline }, others) {
    const several = others.length > 1;
    const columns = (results, total) => [
      baseline ? cell(spread(results[baseline].accuracy, share, 2)) : null,
      others.map((method) => [cell(spread(results[method].accuracy, share, 2)), baseline ? cell(spread(results[method].gain, signed, 2), { class: total ? "number" : "number gain" }) : null]),
    ].flat(2);
    const top = h("tr", {}, h("td", { colspan: "3" }), baseline ? head("alone", { class: "number", scope: "colgroup" }) : null,
      others.map((method) => head(method, { colspan: baseline ? "2" : "1", scope: "colgroup" })));
    const heads = h("tr", {}, head("Student"), head("Model"), head("Parameters", { class: "number" }), baseline ? head("accuracy, %", { class: "number" }) : null,
      others.flatMap(() => [head("accuracy, %", { class: "number" }), baseline ? head("gain, points", { class: "number" }) : null]));
    const rows = students.map((student, number) => h("tr", {}, h("th", { scope: "row" }, several ? "" : swatch(look(number)), student.name), h("td", {}, student.model), cell(count(student.parameters)), columns(student.results, false)));
    if (students.length > 1) rows.push(h("tr", { class: "total" }, h("th", { scope: "row" }, "Mean"), h("td", {}), h("td", {}), columns(means, true)));
    return table("gains", `Test accuracy after the last epoch, ${list(methods)}.`, [top, heads], rows);
  }

  function picture({ pictures }, several) {
    if (!pictures) return empty("No student has a complete run alone and a complete run together with the same seed, so there is no gain to draw.");
    const parsed = (text, kind) => {
      const svg = document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
      svg.classList.add(kind);
      return svg;
    };
    return h("figure", { class: "picture" }, parsed(pictures.wide, "wide"), parsed(pictures.narrow, "narrow"),
      h("figcaption", {}, `Dot: mean over seeds. Whisker: one sample standard deviation to each side. Ring: one seed.${several ? " Colours tell methods apart." : ""}`));
  }

  function chartsByStudent({ students, means, baseline }, others, several) {
    const all = [...students, ...(students.length > 1 ? [{ name: "All students, mean", results: means, mean: true }] : [])];
    const { ranges, note } = sameAxes(all, baseline);
    const figures = all.map((student, number) => chart({
      title: student.name, x: "epoch", y: "test accuracy, %", axis: "share", small: true, ranges, nothing: "No complete run.",
      series: [
        ...(baseline ? [line(student, baseline, { colour: "--soft", dash: [6, 4] }, "alone")] : []),
        ...others.map((method, column) => line(student, method, { colour: several ? look(column).colour : student.mean ? "--ink" : look(number).colour, dash: [] }, method)),
      ] }));
    return [note, h("div", { class: "charts small" }, figures)];
  }

  // Of many methods a chart for each, as their lines in one would hide each other.
  function chartsByMethod({ students, means, methods, baseline }) {
    const all = students.length > COLOURS ? [{ name: "all students, mean", results: means }] : students;
    const { ranges, note } = sameAxes(all, baseline);
    const figures = methods.filter((method) => method !== baseline).map((method) => chart({
      title: method, x: "epoch", y: "test accuracy, %", axis: "share", small: true, ranges, nothing: "No complete run.",
      series: all.flatMap((student, number) => [
        ...(baseline ? [{ ...line(student, baseline, { ...look(number), dash: [6, 4] }, `${student.name} alone`), low: [], high: [] }] : []),
        line(student, method, { ...look(number), dash: [] }, student.name),
      ]) }));
    return [note, h("div", { class: "charts small" }, figures)];
  }

  function line(student, method, style, name) {
    const curve = student.results[method].curve;
    return { name, look: style, x: curve.epochs_trained, y: curve.mean, low: curve.low, high: curve.high, points: false };
  }

  // Axes that hold all curves, and the note that says so.
  function sameAxes(all, baseline) {
    const numbers = all.flatMap((student) => Object.values(student.results).map((result) => result.curve));
    const epochs = numbers.flatMap((curve) => curve.epochs_trained).filter(known);
    const [first, end] = [Math.min(...epochs), Math.max(...epochs)];
    // The steep beginning would press the differences of the end together, so it may run out of the charts.
    const settled = (from) => numbers.flatMap((curve) => [curve.mean, curve.low, curve.high].flatMap((column) => column.filter((_, index) => curve.epochs_trained[index] >= from))).filter(known);
    const late = settled(first + (end - first) / 4);
    const bounds = late.length ? AXES.share.range(Math.min(...late), Math.max(...settled(first))) : [0, 1];
    const cut = numbers.some((curve) => curve.mean.some((value) => value < bounds[0]));
    const note = h("p", { class: "note" }, `Test accuracy against epochs, mean over the complete runs, all charts on the same axes.${baseline ? " Dashed: alone. Solid: together." : ""} Bands: one sample standard deviation to each side, where there are several seeds.${cut ? ` The axes begin at ${percent(bounds[0], 1)}; what lies below, in the first quarter of training, is not shown.` : ""}`);
    return { ranges: { x: [first, Math.max(end, first + 1)], y: bounds }, note };
  }

  function seedTable({ students, methods, seeds, baseline }) {
    const rows = students.flatMap((student) => methods.map((method, place) => h("tr", {},
      place === 0 ? h("th", { scope: "rowgroup", rowspan: String(methods.length) }, student.name) : null,
      h("td", {}, method),
      seeds.map((seed) => {
        const { accuracy, gain } = student.results[method];
        const value = accuracy.values[seed];
        const more = gain && gain.values[seed];
        return cell(known(value) ? [share(value), known(more) ? h("span", { class: "spread" }, ` (${signed(more)})`) : ""] : "–");
      }))));
    return table("seeds", `Test accuracy after the last epoch, %${baseline ? "; in brackets the gain over training alone with the same seed, points" : ""}.`,
      h("tr", {}, head("Student"), head("Method"), seeds.map((seed) => head(`seed ${seed}`, { class: "number" }))), rows);
  }

  function runTable(runs) {
    return table("runs", "Waits are from a round’s first contribution to its last. Each run’s own report has the details.",
      h("tr", {}, head("Run"), head("Time", { class: "number" }), head("Rounds closed", { class: "number" }), head("Median wait", { class: "number" }), head("Longest wait", { class: "number" }), head("Most waited for"), head("Events")),
      runs.map((run) => {
        const name = `${run.method}, seed ${run.seed}`;
        if (run.problem) return h("tr", {}, h("th", { scope: "row" }, name), h("td", { colspan: "6" }, run.problem));
        const events = Object.entries(run.events).map(([what, times]) => (times > 1 ? `${shownKind(what)} ×${count(times)}` : shownKind(what))).join(", ");
        return h("tr", {}, h("th", { scope: "row" }, run.report ? h("a", { href: run.report }, name) : name), cell(seconds(run.seconds)), cell(run.closed_rounds ? count(run.closed_rounds) : "–"),
          cell(seconds(run.median_wait)), cell(seconds(run.longest_wait)), h("td", {}, run.most_waited_for ? `${run.most_waited_for.participant}, ${seconds(run.most_waited_for.seconds)}` : "–"), h("td", { class: "message" }, events || "none"));
      }));
  }

  // ---- a run that goes on

  const NOTICE_SECONDS = 3; // shorter waits are the rounds' own

  // link: { lost: why nothing was heard, or null; since: when something was heard last, in ms since 1970 }
  function now(state, link) {
    const place = document.getElementById("now");
    if (place) adopt(place, h("section", { id: "now", class: "now" }, nowLine(state, link), state ? nowDetails(state, link) : null));
  }

  const hour = (milliseconds) => new Date(milliseconds).toLocaleTimeString("en-GB");

  function nowLine(state, { lost, since }) {
    const line = (kind, name, ...text) => h("p", { class: `state ${kind}`, role: "status", id: "state" }, h("b", {}, name), " ", h("span", {}, ...text));
    if (state && state.complete) return line("good", "Finished.", "Every student has trained all its steps; this page is the run’s report.");
    if (lost && state && state.ending) return line("bad", "Stopped.", `The server went down at ${hour(since)}. This page goes on by itself when it is started again.`);
    if (lost) return line("bad", "Connection lost.", `${lost}. ${state ? `What is shown is of ${hour(since)}. ` : ""}Trying again every two seconds.`);
    if (!state) return line("", "Connecting …");
    if (state.ending) return line("bad", "Stopping.", "The server goes down.");
    const { waiting } = state;
    if (waiting.participants.length && waiting.seconds >= NOTICE_SECONDS)
      return line("bad", "Waiting", `for ${list(waiting.participants)} in round ${count(state.frontier)}, for ${seconds(waiting.seconds, (number) => number.toFixed(0))}.`);
    if (!state.total_steps) return line("", "Ready.", "Nobody has joined yet.");
    const left = state.rounds_per_second > 0 ? (state.total_rounds - state.frontier) / state.rounds_per_second : null;
    return line("good", "Running.", `Step ${count(state.steps_trained)} of ${count(state.total_steps)}${known(left) && state.rounds_per_second >= 0.01 ? `, about ${seconds(left, (number) => number.toFixed(0))} left at ${rate(state.rounds_per_second)}` : ""}.`);
  }

  const rate = (value) => `${value >= 100 ? value.toFixed(0) : value.toPrecision(2)} rounds/s`;

  // What the server says of a participant, and beside it whether the open round waits for it, or rounds close without it.
  function stateCell(participant, state, waitedFor) {
    const skipped = state.total_rounds > 0 && !participant.awaited && participant.state !== "finished";
    const more = waitedFor ? ", waited for" : skipped ? ", skipped" : "";
    return h("td", {}, h("span", { class: `state-of ${participant.state}${waitedFor ? " waited-for" : ""}` }, participant.state + more));
  }

  function nowDetails(state, { lost }) {
    if (state.complete) return [];
    const { waiting, participants } = state;
    const waitedFor = new Set(waiting.seconds >= NOTICE_SECONDS ? waiting.participants : []);
    const figures = [
      tile(state.total_steps ? percent(state.steps_trained / state.total_steps, 1) : "–", `of the steps: ${count(state.steps_trained)} of ${count(state.total_steps || null)}`, true),
      ...(state.total_rounds ? [ // a run that exchanges nothing has no rounds
        tile(rate(state.rounds_per_second), "closed, over the last seconds"),
        tile(waiting.participants.length ? seconds(waiting.seconds) : `0${GAP}s`, waiting.participants.length ? `round ${count(state.frontier)} waits for ${list(waiting.participants)}` : `nobody is waited for in round ${count(state.frontier)}`),
      ] : []),
      ...(known(state.ensemble_accuracy) ? [tile(percent(state.ensemble_accuracy), "accuracy of the ensemble on training samples, over the last epoch")] : []),
    ];
    const some = { missed: participants.some((participant) => participant.missed_rounds), joins: participants.some((participant) => participant.joins > 1), restarts: [...best.values()].some((each) => each.restarts) };
    const rows = participants.map((participant, number) => {
      const more = best.get(participant.name) || {};
      return h("tr", {}, h("th", { scope: "row" }, swatch(look(number)), participant.role === "teacher" ? `${participant.name} (teacher)` : participant.name), stateCell(participant, state, waitedFor.has(participant.name)),
        cell(count(participant.steps_trained)), cell(participant.epochs_trained.toFixed(1)), cell(percent(participant.train_accuracy)), cell(percent(participant.test_accuracy)), cell(percent(more.accuracy)),
        cell(seconds(participant.step_seconds)), cell(seconds(participant.wait_seconds)),
        some.missed ? cell(count(participant.missed_rounds)) : null, some.restarts ? cell(count(more.restarts || 0)) : null, some.joins ? cell(count(participant.joins)) : null);
    });
    const heads = h("tr", {}, head("Participant"), head("State"), head("Steps", { class: "number" }), head("Epochs", { class: "number" }), head("Training accuracy", { class: "number" }),
      head("Test accuracy", { class: "number" }), head("Best test", { class: "number" }), head("Step time", { class: "number" }), head("of it waiting", { class: "number" }),
      some.missed ? head("Missed rounds", { class: "number" }) : null, some.restarts ? head("Restarts", { class: "number" }) : null, some.joins ? head("Joins", { class: "number" }) : null);
    const events = h("ol", { class: "latest", id: "latest" }, [...state.events].reverse().map((event) => h("li", {}, h("time", { title: moment(event.time) }, hour(1000 * event.time)), " ",
      h("code", {}, shownKind(event.what)), " ", event.participant ? h("b", {}, event.participant) : "", ` ${event.message}`)));
    return h("div", { class: lost ? "stale" : null, id: "details" }, h("div", { class: "tiles" }, figures), table("states", "Where every participant is now.", heads, rows),
      state.events.length ? [h("h3", {}, "Last events"), events] : null);
  }

  // ---- the page

  const keyOf = (node) => node.id || "";

  // Makes `old` what `fresh` is, and touches only what differs, so that what the reader reads or holds stays.
  function adopt(old, fresh) {
    if (drawnIn.has(old) || drawnIn.has(fresh)) {
      const [was, is] = [drawnIn.get(old), drawnIn.get(fresh)];
      if (was && is && was.drawn && alike(was, is)) {
        refresh(was, is);
        charts[charts.indexOf(is)] = was;
      } else {
        old.replaceWith(fresh);
      }
      return;
    }
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
      old.replaceWith(fresh);
      return;
    }
    if (old.nodeType === Node.TEXT_NODE) {
      if (old.data !== fresh.data) old.data = fresh.data;
      return;
    }
    for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of [...fresh.attributes]) if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
    if (old.style && old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
    adoptChildren(old, [...fresh.childNodes]);
  }

  function adoptChildren(parent, wanted) {
    const keyed = new Map([...parent.childNodes].filter(keyOf).map((node) => [keyOf(node), node]));
    let at = parent.firstChild;
    for (const fresh of wanted) {
      const old = keyOf(fresh) ? keyed.get(keyOf(fresh)) : at && !keyOf(at) && at.nodeName === fresh.nodeName ? at : null;
      if (!old) {
        parent.insertBefore(fresh, at);
        continue;
      }
      if (old === at) at = at.nextSibling;
      else parent.insertBefore(old, at);
      if (old.id !== "now") adopt(old, fresh);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  function waitingForData({ title }) {
    return [h("header", {}, h("p", { class: "kicker" }, "codistill · run"), h("h1", {}, title)), h("section", { id: "now" })];
  }

  function render(data) {
    const before = charts;
    charts = [];
    live = live || data.kind === "live";
    if (data.kind === "run") best = new Map(data.participants.map(({ name, best: measured, restarts }) => [name, { accuracy: measured ? measured.accuracy : null, restarts }]));
    const content = data.kind === "comparison" ? comparison(data) : data.kind === "run" ? run(data) : waitingForData(data);
    adoptChildren(document.getElementById("report"), [...content.filter(Boolean),
      h("footer", {}, live ? "Made by codistill from the records of this run, by its own server. This page loads nothing from anywhere else." : "Made by codistill from the records in this folder. This page loads nothing from anywhere.")]);
    for (const item of before) if (item.drawn && !charts.includes(item)) item.drawn.destroy();
    for (const item of charts) if (!item.drawn) draw(item);
    root.dataset.charts = String(charts.length);
  }

  window.addEventListener("error", (event) => { root.dataset.error = root.dataset.error || event.message; });
  window.addEventListener("resize", resize);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { root.setAttribute("data-print", ""); redraw(); });
  window.addEventListener("afterprint", () => { root.removeAttribute("data-print"); redraw(); });

  return { render, now };
})();

codistill.render(JSON.parse(document.getElementById("document").textContent));
