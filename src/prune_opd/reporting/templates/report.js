"use strict";
// Everything that a model wrote goes into the page as text nodes, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, within = document) => within.querySelector(selector);
const SVG = "http://www.w3.org/2000/svg";

function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const armColour = (arm) => `var(--c${DATA.arms.findIndex((a) => a.arm === arm) % 8})`;
const stepColour = (i, n) => `color-mix(in oklab, var(--last) ${n > 1 ? Math.round((100 * i) / (n - 1)) : 100}%, var(--first))`;
const known = (value) => value !== null && value !== undefined;
const average = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function number(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  const digits = size === 0 || Number.isInteger(value) ? 0 : size < 0.1 ? 3 : size < 10 ? 2 : size < 100 ? 1 : 0;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
}
// A format for all ticks of an axis: as many digits as their distance needs.
const likeTicks = (marks) => (value) => {
  const step = marks.length > 1 ? marks[1] - marks[0] : marks[0] || 1;
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9) + (`${step}`.includes("25") && step < 1 ? 1 : 0)));
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
};
const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)}%` : "–");
const nats = (value) => value.toFixed(2).replace("-", "−");
const tokens = (n) => `${number(n)} token${n === 1 ? "" : "s"}`;

// ---- charts ----

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return found;
}

function legend(figure, entries) {
  $(".legend", figure).replaceChildren(
    ...entries.map(({ name, colour, kind = "" }) => {
      const swatch = html("i", { class: kind });
      swatch.style[kind === "block" ? "background" : "borderColor"] = colour;
      return html("span", {}, swatch, name);
    }),
  );
}

function nothing(figure, why) {
  $(".legend", figure).replaceChildren();
  $(".plot", figure).replaceChildren(html("p", { class: "none" }, why));
}

// Draws axes into a figure and hands the scales to `draw`. x, y: {low, high, label, format?}, x also ticks?: [[value, text]].
function frame(figure, x, y, draw, height = 262) {
  const plot = $(".plot", figure);
  const width = Math.max(plot.clientWidth, 220);
  const box = { left: 52, right: width - 10, top: 26, bottom: height - 42 };
  const sx = (v) => box.left + ((v - x.low) / (x.high - x.low || 1)) * (box.right - box.left);
  const sy = (v) => box.bottom - ((v - y.low) / (y.high - y.low || 1)) * (box.bottom - box.top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": $("h2", figure).textContent });
  const marks = ticks(y.low, y.high, 4);
  for (const [value, text] of marks.map((v) => [v, (y.format ?? likeTicks(marks))(v)])) {
    root.append(
      svg("line", { class: "grid", x1: box.left, x2: box.right, y1: sy(value), y2: sy(value) }),
      svg("text", { x: box.left - 8, y: sy(value) + 4, "text-anchor": "end" }, text),
    );
  }
  const whole = ticks(x.low, x.high, Math.max(2, Math.floor(width / 110))).filter(Number.isInteger);
  const every = x.ticks ?? whole.map((v) => [v, x.format(v)]);
  for (const [value, text] of every) root.append(svg("text", { x: sx(value), y: box.bottom + 17, "text-anchor": "middle" }, text));
  root.append(
    svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    svg("text", { class: "label", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, x.label),
    svg("text", { class: "label", x: 0, y: 12, "text-anchor": "start" }, y.label),
  );
  draw(root, sx, sy, box);
  plot.replaceChildren(root);
  return { root, sx, sy, box, width, x };
}

// lines: {name, colour, points: [[x, y], …], dashed?, thin?, dots?, bars?: [[x, low, high], …]}
function lineChart(figure, lines, x, y) {
  const drawn = lines.filter((line) => line.points.length);
  const all = drawn.flatMap((line) => line.points);
  if (!all.length) return nothing(figure, "Nothing has been logged yet.");
  const spread = drawn.flatMap((line) => (line.bars ?? []).flatMap(([at, low, high]) => [[at, low], [at, high]])).concat(all);
  const low = y.low ?? Math.min(...spread.map((p) => p[1]));
  const high = y.high ?? Math.max(...spread.map((p) => p[1]));
  const pad = y.high === undefined ? (high - low) * 0.06 || 0.05 * Math.abs(high) || 1 : 0;
  const xs = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  const xAxis = { low: xs[0], high: xs.at(-1) === xs[0] ? xs[0] + 1 : xs.at(-1), format: number, ...x };
  const yAxis = { ...y, low: y.low ?? Math.max(low - pad, low >= 0 ? 0 : -Infinity), high: high + pad };
  const made = frame(figure, xAxis, yAxis, (root, sx, sy) => {
    for (const line of drawn) {
      for (const [at, from, to] of line.bars ?? []) {
        const bar = svg("line", { x1: sx(at), x2: sx(at), y1: sy(from), y2: sy(to), "stroke-width": 6, "stroke-linecap": "round", opacity: 0.22 });
        bar.style.stroke = line.colour;
        root.append(bar);
      }
      const path = svg("path", {
        class: "line",
        d: line.points.map(([px, py], i) => `${i ? "L" : "M"}${sx(px).toFixed(1)} ${sy(py).toFixed(1)}`).join(""),
        "stroke-width": line.thin ? 1 : 2.2,
        opacity: line.thin ? 0.45 : 1,
        "stroke-dasharray": line.dashed ? "5 4" : "none",
      });
      path.style.stroke = line.colour;
      root.append(path);
      if (line.dots || line.points.length === 1) {
        for (const [px, py] of line.points) {
          const dot = svg("circle", { cx: sx(px), cy: sy(py), r: 3.4 });
          dot.style.fill = line.colour;
          root.append(dot);
        }
      }
    }
  });
  legend(figure, drawn.filter((l) => !l.thin).map((l) => ({ name: l.name, colour: l.colour, kind: l.dashed ? "dashed" : "" })));
  const named = drawn.filter((line) => !line.thin);
  hover(figure, made, xs, (at) => ({
    title: `${x.label}: ${x.name ? x.name(at) : xAxis.format(at)}`,
    rows: named.flatMap((line) => {
      const exact = line.points.find((p) => p[0] === at);
      return exact ? [{ ...line, text: (y.exact ?? number)(exact[1]) }] : [];
    }),
  }));
}

// A line at the nearest x under the pointer, and a box with what is there.
function hover(figure, { root, sx, box, width }, xs, describe) {
  const cross = svg("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
  root.append(cross);
  const tip = $("#tip");
  const leave = () => {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
  };
  root.onpointerleave = leave;
  root.onpointermove = root.onpointerdown = (event) => {
    const area = root.getBoundingClientRect();
    const here = ((event.clientX - area.left) / area.width) * width;
    const at = xs.reduce((best, v) => (Math.abs(sx(v) - here) < Math.abs(sx(best) - here) ? v : best));
    const { title, rows } = describe(at, event);
    if (!rows.length) return leave();
    cross.setAttribute("x1", sx(at));
    cross.setAttribute("x2", sx(at));
    cross.setAttribute("visibility", "visible");
    showTip(event, title, rows);
  };
}

function showTip(event, title, rows) {
  const tip = $("#tip");
  tip.replaceChildren(
    html("b", {}, title),
    ...rows.map((row) => {
      const dot = html("i");
      dot.style.background = row.colour;
      return html("div", {}, dot, row.name, html("em", {}, row.text));
    }),
  );
  tip.hidden = false;
  place(tip, event.clientX, event.clientY);
}

function place(box, x, y) {
  const { offsetWidth: w, offsetHeight: h } = box;
  box.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - w - 8))}px`;
  box.style.top = `${y + 18 + h > innerHeight ? Math.max(8, y - h - 14) : y + 18}px`;
}

// ---- over all runs ----

function accuracyChart() {
  const figure = $("#accuracy");
  const lines = [];
  for (const { arm } of DATA.arms) {
    const runs = DATA.runs.filter((run) => run.arm === arm && run.evaluations.length);
    const colour = armColour(arm);
    const steps = runs.length ? runs[0].evaluations.map((e) => e.step).filter((s) => runs.every((r) => r.evaluations.some((e) => e.step === s))) : [];
    const mean = (step, of) => average(runs.map((run) => run.evaluations.find((e) => e.step === step)[of]));
    if (runs.length > 1) for (const run of runs) lines.push({ name: run.name, colour, thin: true, points: run.evaluations.map((e) => [e.seconds, e.accuracy]) });
    lines.push({
      name: arm,
      colour,
      dots: true,
      points: steps.map((s) => [mean(s, "seconds"), mean(s, "accuracy")]),
      bars: steps.map((s) => [mean(s, "seconds"), mean(s, "low"), mean(s, "high")]),
    });
  }
  if (!lines.some((line) => line.points.length)) return nothing(figure, "No evaluation has been logged: set evaluation.data in the recipe.");
  lineChart(figure, lines, { label: "seconds of training", low: 0 }, { label: "accuracy", format: (v) => `${Math.round(100 * v)}%`, exact: percent });
}

const PARTS = [["rollout", "var(--c0)"], ["teacher", "var(--c1)"], ["update", "var(--c2)"], ["other", "var(--line)"]];

function costChart() {
  const figure = $("#cost");
  const plot = $(".plot", figure);
  const width = Math.max(plot.clientWidth, 220);
  const most = Math.max(...DATA.arms.map((a) => a.seconds.all)) || 1;
  const row = 46;
  const height = DATA.arms.length * row + 6;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "seconds of training by part" });
  DATA.arms.forEach(({ arm, seconds }, i) => {
    const y = i * row;
    root.append(
      svg("text", { class: "label", x: 0, y: y + 12 }, arm),
      svg("text", { class: "label", x: width, y: y + 12, "text-anchor": "end" }, `${number(seconds.all)} s`),
    );
    let x = 0;
    for (const [part, colour] of PARTS) {
      const length = (Math.max(0, seconds[part]) / most) * width;
      const bar = svg("rect", { x, y: y + 18, width: Math.max(0, length - 1), height: 16, rx: 2 });
      bar.style.fill = colour;
      bar.onpointermove = bar.onpointerdown = (event) =>
        showTip(event, arm, [{ name: part, colour, text: `${number(seconds[part])} s (${percent(seconds[part] / (seconds.all || 1))})` }]);
      bar.onpointerleave = () => ($("#tip").hidden = true);
      root.append(bar);
      x += length;
    }
  });
  plot.replaceChildren(root);
  legend(figure, PARTS.map(([name, colour]) => ({ name, colour, kind: "block" })));
}

// ---- of the chosen run ----

function heatMap(run) {
  const figure = $("#heat");
  for (const element of figure.querySelectorAll(".k")) element.textContent = run.k;
  $(".gamma", figure).textContent = run.threshold;
  if (!run.heat || !run.heat.columns.length) return nothing(figure, "drift.jsonl has nothing of this run.");
  const { columns, width, height } = run.heat;
  const rows = columns[0].length / 2;
  const canvas = html("canvas", { width: columns.length, height: rows });
  const context = canvas.getContext("2d");
  const cell = (c, r) => parseInt(columns[c].slice(2 * r, 2 * r + 2), 16);
  const values = columns.flatMap((_, c) => Array.from({ length: rows }, (_, r) => cell(c, r)).filter((v) => v < 255)).map((v) => v / 250);
  const middle = run.threshold;
  const reach = Math.max(0.05, ...values.map((v) => Math.abs(v - middle)));
  const colour = (v) => mix(v < middle ? "--hot" : "--cold", Math.min(1, Math.abs(v - middle) / reach));
  for (let c = 0; c < columns.length; c++) {
    for (let r = 0; r < rows; r++) {
      const value = cell(c, r);
      if (value === 255) continue;
      context.fillStyle = colour(value / 250);
      context.fillRect(c, rows - 1 - r, 1, 1);
    }
  }
  const x = { low: 0.5, high: columns.length * width + 0.5, label: "step", format: number };
  const y = { low: 0, high: rows * height, label: "position in the response" };
  const made = frame(figure, x, y, (root, sx, sy, box) => {
    const image = svg("image", { href: canvas.toDataURL(), x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top, preserveAspectRatio: "none" });
    image.style.imageRendering = "pixelated";
    root.append(image);
  }, 300);
  const centres = columns.map((_, c) => (c + 0.5) * width + 0.5);
  hover(figure, made, centres, (at, event) => {
    const c = centres.indexOf(at);
    const area = made.root.getBoundingClientRect();
    const inside = (made.box.bottom - (event.clientY - area.top)) / (made.box.bottom - made.box.top);
    const r = Math.max(0, Math.min(rows - 1, Math.floor(inside * rows)));
    const value = cell(c, r);
    const steps = width > 1 ? `steps ${c * width + 1}–${(c + 1) * width}` : `step ${c + 1}`;
    return {
      title: `${steps}, positions ${r * height}–${(r + 1) * height - 1}`,
      rows: value === 255 ? [] : [{ name: "overlap", colour: colour(value / 250), text: (value / 250).toFixed(2) }],
    };
  });
  const ramp = html("i", { class: "ramp block" });
  ramp.style.background = `linear-gradient(90deg, ${[-1, -0.5, 0, 0.5, 1].map((t) => mix(t < 0 ? "--hot" : "--cold", Math.abs(t))).join(",")})`;
  ramp.style.width = "160px";
  const end = (t) => Math.min(1, Math.max(0, middle + t * reach)).toFixed(2);
  $(".legend", figure).replaceChildren(html("span", {}, end(-1), ramp, end(1)), html("span", {}, `middle: γ = ${middle}`));
}

function mix(colour, share) {
  const [from, to] = [cssColour("--mid"), cssColour(colour)].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return `rgb(${from.map((v, i) => Math.round(v + (to[i] - v) * share)).join(" ")})`;
}

function points(run, name) {
  return run.steps.map((step, i) => [step, run.series[name][i]]).filter((p) => known(p[1]));
}

function windowChart(run) {
  const figure = $("#window");
  lineChart(figure, [
    { name: "window M", colour: "var(--c0)", points: points(run, "window") },
    { name: "E, 90th percentile", colour: "var(--c1)", dashed: true, points: points(run, "effective_p90") },
    { name: "E, mean", colour: "var(--c2)", points: points(run, "effective_mean") },
    { name: "length, mean", colour: "var(--soft)", dashed: true, points: points(run, "length") },
  ], { label: "step" }, { label: "tokens", low: 0 });
  $(".reading", figure).textContent = `The window grew after ${run.grew} of ${run.done} steps.`;
}

function weightChart(run) {
  const figure = $("#weights");
  $(".count", figure).textContent = run.weights.length;
  if (!run.weights.length) return nothing(figure, "Not logged: the run is of an earlier version, or has no step yet.");
  const n = run.weights.length;
  lineChart(figure, run.weights.map(({ step, every, values }, i) => ({
    name: `step ${step}`, colour: stepColour(i, n), points: values.map((v, t) => [t * every, v]),
  })), { label: "position in the response" }, { label: "weight", low: 0 });
}

function onsetChart(run) {
  const figure = $("#onset");
  if (!run.onset || !run.onset.halves.some((h) => h.length)) return nothing(figure, "drift.jsonl has nothing of this run.");
  const { edges, halves, none } = run.onset;
  const names = ["first half of the steps", "second half"];
  const colours = ["var(--first)", "var(--last)"];
  const bins = edges.length - 1;
  const label = (i) => (edges[i + 1] - edges[i] === 1 ? `${edges[i]}` : `${edges[i]}–${edges[i + 1] - 1}`);
  const high = Math.max(...halves.flat(), 0.01) * 1.08;
  const skip = Math.ceil(bins / Math.max(3, Math.floor($(".plot", figure).clientWidth / 58)));
  const x = { low: -0.5, high: bins - 0.5, label: "position of the first event", ticks: edges.slice(0, -1).map((_, i) => [i, label(i)]).filter((_, i) => i % skip === 0) };
  const made = frame(figure, x, { low: 0, high, label: "share of rollouts", format: (v) => `${Math.round(100 * v)}%` }, (root, sx, sy, box) => {
    const wide = ((box.right - box.left) / bins) * 0.38;
    halves.forEach((shares, h) => shares.forEach((share, i) => {
      const bar = svg("rect", { x: sx(i) + (h - 1) * wide, y: sy(share), width: wide - 1, height: Math.max(0, box.bottom - sy(share)), rx: 1.5 });
      bar.style.fill = colours[h];
      root.append(bar);
    }));
  });
  hover(figure, made, edges.slice(0, -1).map((_, i) => i), (i) => ({
    title: `first event at ${label(i)}`,
    rows: halves.flatMap((shares, h) => (shares.length ? [{ name: names[h], colour: colours[h], text: percent(shares[i]) }] : [])),
  }));
  legend(figure, names.map((name, h) => ({ name, colour: colours[h], kind: "block" })));
  const shown = none.map(percent);
  $(".reading", figure).textContent = `No event at all: ${shown[0]}, later ${shown[1]}.`;
}

function overlapChart(run) {
  lineChart($("#overlap"), [
    { name: "overlap", colour: "var(--c0)", points: points(run, "overlap") },
    { name: "ended by itself", colour: "var(--c2)", dashed: true, points: points(run, "ended") },
  ], { label: "step" }, { label: "share", low: 0, high: 1, exact: percent });
}

function bucketChart(run, name) {
  const curves = run.buckets[name].filter((curve) => curve.values.length);
  const figure = $(`#${name}`);
  if (!curves.length) return nothing(figure, "Nothing has been logged yet.");
  const longest = curves.map((c) => c.values).reduce((a, b) => (b.length > a.length ? b : a));
  const label = (i) => (longest[i] ? `${longest[i][0]}–${longest[i][1] - 1}` : "");
  lineChart(figure, curves.map(({ step, values }, i) => ({
    name: `step ${step}`, colour: stepColour(i, curves.length), dots: true, points: values.map((v, b) => [b, v[2]]),
  })), {
    label: "position in the response", low: -0.3, high: longest.length - 0.7, name: label,
    ticks: longest.map((_, i) => [i, label(i)]),
  }, { label: "nats", low: 0 });
}

// ---- rollouts ----

const COLOURS = {
  weight: { title: "weight", level: (run, r, t) => 9 * (run.full_weight - r.weight[t]), why: (run) => `Darker is less weight; none is the full ${run.full_weight}.` },
  overlap: { title: "overlap", level: (run, r, t) => 9 * (1 - r.shared[t] / run.k), why: () => "Darker is less overlap of the two top-k sets." },
  teacher: { title: "teacher's log q", level: (run, r, t) => -r.teacher_logprob[t], why: () => "Darker is a token that the teacher finds less likely; darkest is −9 nats and below." },
};
const view = { run: null, rollout: Infinity, colour: "weight", token: null, pinned: false };

const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";

function viewer() {
  const { run } = view;
  const box = $("#viewer");
  const select = $("#rollout");
  select.replaceChildren(...run.rollouts.map((r, i) => html("option", { value: i }, `step ${r.step}, ${tokens(r.length ?? 0)}${r.onset >= 0 ? `, drifts at ${r.onset}` : ""}`)));
  view.rollout = Math.min(view.rollout, Math.max(0, run.rollouts.length - 1));
  select.value = view.rollout;
  choices($("#colour"), "colour by", Object.entries(COLOURS).map(([value, c]) => [value, c.title]), view.colour, (value) => {
    view.colour = value;
    viewer();
  });
  hideToken();
  const rollout = run.rollouts[view.rollout];
  const [facts, prompt, response, note] = [".facts", ".prompt", ".tokens", ".note"].map((s) => $(s, box));
  facts.replaceChildren();
  prompt.textContent = response.textContent = note.textContent = "";
  if (!rollout) {
    note.textContent = "No rollout of this run was written.";
    return;
  }
  const end = rollout.finished ? "ended by itself" : rollout.stopped ? "stopped for drift" : "cut by the window";
  const fact = (name, value) => html("span", {}, `${name} `, html("b", {}, value));
  facts.append(
    fact("length", number(rollout.length ?? null)), fact("effective length", number(rollout.effective_length)),
    fact("first event", rollout.onset < 0 ? "none" : number(rollout.onset)), fact("", end), fact("gold answer", rollout.answer ?? "none"),
  );
  prompt.textContent = rollout.prompt;
  if (!rollout.token_ids) {
    response.textContent = rollout.response;
    note.textContent = "This log has no weights and candidates by token (tracking.rollout_tokens = 0, or an earlier version).";
    return;
  }
  const events = new Set(rollout.events);
  response.append(...rollout.token_ids.map((id, t) => {
    const level = Math.max(0, Math.min(9, Math.round(COLOURS[view.colour].level(run, rollout, t))));
    return html("span", { class: `l${level}${events.has(t) ? " event" : ""}`, "data-t": t }, rollout.texts[id].replace(/\n/g, "↵\n") || "∅");
  }));
  const shown = rollout.token_ids.length;
  note.textContent = `${COLOURS[view.colour].why(run)} Underlined: drift events. Hover, tap, or use the arrow keys for candidates.${shown < rollout.length ? ` The first ${tokens(shown)} of ${number(rollout.length)}.` : ""}`;
}

function side(rollout, name, t, title, other) {
  const { ids, logprobs } = rollout[name];
  const body = html("tbody", {}, ...ids[t].map((id, i) => {
    const classes = [other.has(id) ? "shared" : "", id === rollout.token_ids[t] ? "sampled" : ""].join(" ").trim();
    return html("tr", { class: classes }, html("td", { title: rollout.texts[id] }, visible(rollout.texts[id])), html("td", {}, nats(logprobs[t][i])));
  }));
  return html("table", { class: name }, html("thead", {}, html("tr", {}, html("th", {}, title), html("th", {}, name === "student" ? "log p" : "log q"))), body);
}

function showToken(t) {
  const rollout = view.run.rollouts[view.rollout];
  const span = $(`#viewer .tokens span[data-t="${t}"]`);
  if (!span) return;
  $("#viewer .tokens .at")?.classList.remove("at");
  span.classList.add("at");
  view.token = t;
  const [ours, theirs] = ["student", "teacher"].map((name) => new Set(rollout[name].ids[t]));
  const panel = $("#token");
  panel.replaceChildren(
    html("div", { class: "text" }, visible(rollout.texts[rollout.token_ids[t]])),
    html("p", {}, `position ${t} · weight ${rollout.weight[t]} · ${rollout.shared[t]} of ${view.run.k} shared · teacher's log q ${nats(rollout.teacher_logprob[t])}${rollout.events.includes(t) ? " · drift event" : ""}`),
    html("div", { class: "sides" }, side(rollout, "student", t, "student", theirs), side(rollout, "teacher", t, "teacher", ours)),
  );
  panel.hidden = false;
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  place(panel, at.left - 14, at.bottom - 10);
  if (panel.offsetTop < at.bottom && panel.offsetTop + panel.offsetHeight > at.top && innerWidth > 720) panel.style.top = `${Math.max(8, at.top - panel.offsetHeight - 8)}px`;
}

function hideToken() {
  $("#token").hidden = true;
  $("#viewer .tokens .at")?.classList.remove("at");
  view.token = null;
  view.pinned = false;
}

function startViewer() {
  const response = $("#viewer .tokens");
  const tokenAt = (event) => event.target.closest?.("span[data-t]");
  response.onpointerover = (event) => {
    if (event.pointerType === "mouse" && !view.pinned && tokenAt(event)) showToken(+tokenAt(event).dataset.t);
  };
  response.onpointerleave = (event) => event.pointerType === "mouse" && !view.pinned && hideToken();
  response.onclick = (event) => {
    const span = tokenAt(event);
    if (!span || (view.pinned && view.token === +span.dataset.t)) return hideToken();
    showToken(+span.dataset.t);
    view.pinned = true;
  };
  response.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hideToken();
    if (!move || !view.run.rollouts[view.rollout]?.token_ids) return;
    event.preventDefault();
    const last = view.run.rollouts[view.rollout].token_ids.length - 1;
    showToken(view.token === null ? 0 : Math.max(0, Math.min(last, view.token + move)));
    view.pinned = true;
  };
  document.addEventListener("click", (event) => !event.target.closest("#viewer .tokens") && hideToken());
  $("#rollout").onchange = (event) => goTo(+event.target.value);
  $("#previous").onclick = () => goTo(view.rollout - 1);
  $("#next").onclick = () => goTo(view.rollout + 1);
}

function goTo(i) {
  view.rollout = Math.max(0, Math.min(view.run.rollouts.length - 1, i));
  viewer();
}

// ---- choosing a run ----

function choices(element, label, options, chosen, choose) {
  element.replaceChildren(html("span", {}, label), ...options.map(([value, text]) => {
    const button = html("button", { type: "button", role: "radio", "aria-checked": value === chosen, "data-value": value }, text);
    button.onclick = () => choose(value);
    return button;
  }));
}

function select(arm, seed) {
  const of = DATA.runs.filter((run) => run.arm === arm);
  view.run = of.find((run) => run.seed === seed) ?? of[0];
  choices($("#arms"), "arm", DATA.arms.map((a) => [a.arm, a.arm]), arm, (value) => select(value, view.run.seed));
  choices($("#seeds"), "seed", of.map((run) => [run.seed, String(run.seed)]), view.run.seed, (value) => select(arm, value));
  $("#seeds").hidden = of.length < 2;
  $("#selector").hidden = DATA.runs.length < 2;
  if (!view.run.prunes && view.colour === "weight") view.colour = "overlap";
  runCharts();
  viewer();
}

function runCharts() {
  const { run } = view;
  heatMap(run);
  windowChart(run);
  weightChart(run);
  onsetChart(run);
  overlapChart(run);
  bucketChart(run, "reverse_kl");
  bucketChart(run, "entropy_gap");
}

function drawAll() {
  accuracyChart();
  costChart();
  runCharts();
}

startViewer();
accuracyChart();
costChart();
const first = DATA.runs.find((run) => run.prunes) ?? DATA.runs[0];
select(first.arm, first.seed);

let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnWidth) requestAnimationFrame(drawAll);
  drawnWidth = innerWidth;
});
addEventListener("scroll", () => view.pinned || hideToken(), { passive: true });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
