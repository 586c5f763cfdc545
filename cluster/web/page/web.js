"use strict";
// Frames come from /stream, or lie in the page: a recording. Each update shows the newest; a panel that is out of
// sight is not drawn. `superserve.took` has the script time of the last updates, for the tests.
// Of several routers a frame is the whole, and has each one's own frame in `parts`: `view` says which is shown.

const KEPT = 480, MISSES = 100, SHOWN = 40, $ = (id) => document.getElementById(id);
const superserve = { frames: [], took: [], isPaused: false };
window.superserve = superserve;
let all = superserve.frames, frames = all, view = -1, misses = [], charts = {}, isDue = false;

function number(value, digits = 0) {
  return value === null || value === undefined || Number.isNaN(value) ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
// Truncated, not rounded: 100 % must mean that no query missed.
const percent = (share) => (share === null ? "–" : `${number(Math.floor(share * 10000) / 100, 2)} %`);

// --- taking frames -----------------------------------------------------------------------------

function take(frame) {
  if (frame.gone) { sentence("wrong", frame.gone); return; }
  const last = all[all.length - 1];
  if (last && frame.t <= last.t) { if (frame.t > last.t - 5000) return; all.length = 0; misses = []; }
  all.push(frame);
  if (all.length > KEPT) all.shift();
  frames = seen(all);
  const own = view < 0 ? frame : partOf(frame);
  if (own) misses = [...own.misses.slice().reverse(), ...misses].slice(0, MISSES);
  if (!superserve.isPaused) draw();
}

const partOf = (frame) => (frame.parts ? frame.parts[view] : null);
// Returns the frames of the view: the whole, or one router's.
const seen = (list) => (view < 0 ? list : list.map(partOf).filter(Boolean));
const missesOf = (list) => list.flatMap((f) => f.misses).reverse().slice(0, MISSES);

function show(number) {
  view = number;
  frames = seen(all);
  misses = missesOf(frames);
  saidAt = -Infinity;
  charts = {};
  draw();
}

// Frames that came together, as at the start, are drawn once.
function draw() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    const began = performance.now();
    update();
    superserve.took.push(performance.now() - began);
    if (superserve.took.length > 400) superserve.took.shift();
  });
}

// The drawn panels of an update, none of which takes long: the river and the lanes each time, the curves in turn.
const inSight = new Set(["river", "lanes", "rates", "attainment", "subnets"]);
const sight = new IntersectionObserver((seen) => {
  for (const one of seen) if (one.isIntersecting) inSight.add(one.target.id); else inSight.delete(one.target.id);
});
for (const id of [...inSight]) sight.observe($(id));

function panels(frame) {
  if (inSight.has("river")) drawRiver($("river"), frames);
  if (inSight.has("lanes")) drawLanes($("lanes"), frames);
  curves(frame);
}

let turn = 0;
function update() {
  const frame = frames[frames.length - 1];
  if (!frame) return;
  turn += 1;
  routers(all[all.length - 1]);
  verdict(frame);
  panels(frame);
  // What people read changes once a second; tables cost the most.
  if (turn % 4 === 1) workers(frame);
  else if (turn % 4 === 2) missed();
  else if (turn % 4 === 3) { clients(frame); words(frame); }
  else legend(frame);
}

// --- the verdict -------------------------------------------------------------------------------

function sentence(kind, text) {
  if ($("sentence").textContent !== text) $("sentence").textContent = text;  // else it is read aloud again
  $("verdict").className = kind;
}

function verdict(frame) {
  const found = frame.findings[0];
  if (view >= 0 && !partOf(all[all.length - 1])) sentence("wrong", `Router ${view + 1} does not answer.`);
  else if (found) sentence(found.verdict, found.text + (found.fix ? `. ${found.fix}` : ""));
  else sentence("ok", "All is well: nothing to do.");
  $("cluster").textContent = frame.cluster;
  $("about").textContent = `${frame.policy}${frame.model ? `, ${frame.model}` : ""}`;
  const cells = [
    ["Attainment, 10 s", percent(frame.att[0])], ["1 min", percent(frame.att[1])], ["since start", percent(frame.att[2])],
    ["Accuracy, 10 s", frame.acc === null ? "–" : `${number(frame.acc, 2)} %`],
    ["GPUs ready", number(frame.ready)], ["needed", number(frame.needed, 1)], ["at least", number(frame.least, 1)],
    ["In", `${number(frame.in)} q/s`], ["Queue", number(frame.queue)],
  ];
  if (!$("figures").children.length)
    for (const [name] of cells) {
      const cell = document.createElement("div"), dt = document.createElement("dt");
      dt.textContent = name;
      cell.append(dt, document.createElement("dd"));
      $("figures").append(cell);
    }
  cells.forEach(([, text], i) => {
    const dd = $("figures").children[i].lastChild;
    if (dd.textContent !== text) dd.textContent = text;
  });
}

// --- curves ------------------------------------------------------------------------------------

const PARTS = ["to the router", "in the queue", "to the GPU", "behind the batch before it", "running",
  "back to the router", "to the client, at least", "at a worker, in vain"];  // a colour each
const ENDS = ["late", "expired", "infeasible", "overloaded", "failed", "worker_lost", "invalid", "draining"];
const END_COLOUR = { late: 1, expired: 4, infeasible: 3, overloaded: 6, failed: 5, worker_lost: 7, invalid: 5, draining: 5 };

const PAST = { time: false, range: (_, first) => [Math.min(-20, first ?? 0), 0] };

function chart(id, height, series, options) {
  const at = $(id);
  at.textContent = "";
  return new uPlot({
    width: at.clientWidth, height, cursor: { show: false }, series: [{}, ...series],
    axes: [{ stroke: theme.muted, grid: { stroke: theme.grid, width: 0.5 }, values: (_, ticks) => ticks.map((t) => `${t} s`) },
           { stroke: theme.muted, grid: { stroke: theme.grid, width: 0.5 }, size: 56 }],
    scales: { x: PAST, y: { range: (_, low, high) => [0, Math.max(1, high * 1.05)] } }, ...options,
  }, [[], ...series.map(() => [])], at);
}

function makeCharts(frame) {
  const line = (label, stroke, extra = {}) => ({ label, stroke, width: 1.6, points: { show: false }, ...extra });
  charts.ends = ENDS.filter((end) => frames.some((f) => f.missed[end]));
  charts.rates = chart("rates", 190, [line("in", theme.in), line("in time", theme.ok),
    ...charts.ends.map((end) => line(end.replace("_", " "), theme.subnets[END_COLOUR[end]]))], { legend: { show: true, live: false } });
  charts.attainment = chart("attainment", 110, [line("attainment, %", theme.good, { fill: theme.good + "22" })],
    { scales: { x: PAST, y: { range: () => [0, 101] } }, legend: { show: true, live: false } });
  charts.names = frame.subnet_names;
  charts.subnets = chart("subnets", 200, charts.names.map((name, i) =>
    line(name, theme.subnets[i % 8], { fill: theme.subnets[i % 8], width: 0 })).reverse(),
    { scales: { x: PAST, y: { range: () => [0, 1] } }, legend: { show: false } });
  charts.width = $("rates").clientWidth;
}

// Shares of subnets over about a second: a quarter second has too few batches.
function shares(names) {
  const columns = names.map(() => []);
  for (let k = 0; k < frames.length; k++) {
    let total = 0;
    const counts = names.map((name) => {
      let n = 0;
      for (let j = Math.max(0, k - 3); j <= k; j++) n += frames[j].subnets[name] || 0;
      total += n;
      return n;
    });
    let sum = 0;
    counts.forEach((n, i) => { sum += n; columns[i].push(total ? sum / total : null); });
  }
  return columns.reverse();  // the sum of all is drawn first, and the smaller ones over it
}

function curves(frame) {
  const ends = ENDS.filter((end) => frame.missed[end]);
  let isFresh = false;
  if (!charts.rates || ends.some((end) => !charts.ends.includes(end)) || charts.names.length !== frame.subnet_names.length)
    makeCharts(frame), isFresh = true;
  const t = frames.map((f) => Math.round((f.t - frame.t) / 10) / 100);
  const set = (plot, data) => plot.setData([t, ...data]);
  const wanted = (f) => f.ok + ENDS.reduce((sum, end) => sum + (f.missed[end] || 0), 0);
  const which = turn % 4;
  if (isFresh || (which % 2 && inSight.has("rates"))) set(charts.rates, [frames.map((f) => f.in), frames.map((f) => f.ok), ...charts.ends.map((end) => frames.map((f) => f.missed[end] || 0))]);
  if (isFresh || (which === 0 && inSight.has("attainment"))) set(charts.attainment, [frames.map((f) => (wanted(f) ? (100 * f.ok) / wanted(f) : null))]);
  if (isFresh || (which === 0 && inSight.has("subnets"))) set(charts.subnets, shares(charts.names));
}

function legend(frame) {
  const key = frame.subnet_names.join();
  if ($("legend").dataset.key === key) return;
  $("legend").dataset.key = key;
  $("legend").replaceChildren(...frame.subnet_names.map((name, i) => legendItem(`${name}, ${number(frame.accuracies[i], 2)} %`, i)));
}

function legendItem(text, colour) {
  const item = document.createElement("li"), swatch = document.createElement("i");
  swatch.style.background = `var(--s${colour % 8})`;
  item.append(swatch, text);
  return item;
}

// The same in words, for those who do not see the pictures; every ten seconds.
let saidAt = -Infinity;
function words(frame) {
  if (frame.t - saidAt < 10000) return;
  saidAt = frame.t;
  const head = frame.head === null ? "" : `, the earliest with ${number(frame.head, 1)} ms left`;
  $("river-text").textContent = `${number(frame.queue)} queries wait${head}; accuracy served ${number(frame.served_accuracy, 1)} percent.`;
  const lost = Object.entries(frame.missed).map(([end, rate]) => `${number(rate)} ${end}`).join(", ") || "none missed";
  $("rates-text").textContent = `${number(frame.in)} queries a second come in, ${number(frame.ok)} are answered in time, ${lost}.`;
  $("subnets-text").textContent = Object.entries(frame.subnets).map(([name, n]) => `${name}: ${n} queries`).join(", ");
  $("lanes-text").textContent = `${frame.gpus.length} GPUs, ${frame.batches.length} batches in the last quarter second.`;
}

// --- tables ------------------------------------------------------------------------------------

function rows(id, cells) {
  const body = $(id).tBodies[0];
  while (body.rows.length > cells.length) body.deleteRow(-1);
  cells.forEach((texts, i) => {
    const row = body.rows[i] || body.insertRow();
    texts.forEach((text, k) => {
      const cell = row.cells[k] || row.insertCell();
      if (typeof text === "function") { text(cell); return; }
      const isNumber = $(id).tHead.rows[0].cells[k].classList.contains("n");
      if (isNumber && !cell.className) cell.className = "n";
      if (cell.textContent !== text) cell.textContent = text;
    });
  });
}

function workers(frame) {
  const before = frames.length > 4 ? frames[frames.length - 5] : frames[0], seconds = (frame.t - before.t) / 1000;
  const earlier = new Map(before.workers.map((one) => [one.name, one]));
  rows("workers", frame.workers.map((one) => {
    const was = earlier.get(one.name), rate = (key) => (was && seconds > 0 ? Math.max(0, one[key] - was[key]) / seconds : null);
    const busy = rate("busy_s");
    return [
      (cell) => {
        if (cell.dataset.name === one.name) return;
        cell.dataset.name = one.name;
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = one.name;
        button.title = "Show the end of its log";
        button.addEventListener("click", () => showLog(one.process));
        cell.replaceChildren(button);
      },
      one.host,
      (cell) => { cell.textContent = one.state; cell.className = one.state === "ready" ? "state-ready" : "state-bad"; },
      one.subnet || "–", number(rate("queries")), busy === null ? "–" : `${number(100 * Math.min(1, busy))} %`,
      number(one.slowdown, 2), number(one.transport_ms, 2), number(one.temperature_c), one.version,
    ];
  }));
}

async function showLog(name) {
  const at = $("log");
  at.hidden = false;
  at.textContent = superserve.isRecorded ? "A recording has no logs." : await (await fetch(`log/${encodeURIComponent(name)}`)).text();
  at.focus();
  at.scrollTop = at.scrollHeight;
}

// New rows come in at the top; those that are there already stay as they are.
function missed() {
  const body = $("misses").tBodies[0], wanted = misses.slice(0, superserve.isPaused ? MISSES : SHOWN);
  let fresh = body.rows.length ? wanted.indexOf(body.rows[0].miss) : -1;
  if (fresh < 0) { body.replaceChildren(); fresh = wanted.length; }
  for (let i = fresh - 1; i >= 0; i--) missRow(body.insertRow(0), wanted[i]);
  for (let i = body.rows.length; i < wanted.length; i++) missRow(body.insertRow(-1), wanted[i]);
  while (body.rows.length > wanted.length) body.deleteRow(-1);
  $("no-misses").hidden = wanted.length > 0;
}

function missRow(row, one) {
  row.miss = one;
  for (const [i, text] of [one.name, one.status.replace("_", " "), number(one.took, 1), number(one.slack, 1)].entries()) {
    const cell = row.insertCell();
    cell.textContent = text;
    if (i > 1) cell.className = "n";
  }
  const bar = document.createElement("div"), text = one.parts.map(([name, ms]) => `${name} ${ms} ms`).join(", ");
  bar.className = "parts";
  bar.title = text;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", text);
  one.parts.forEach(([name, ms]) => {
    const part = document.createElement("i");
    part.style.width = `${(100 * Math.max(0, ms)) / Math.max(one.took, 0.01)}%`;
    part.style.background = `var(--s${Math.max(0, PARTS.indexOf(name))})`;
    bar.append(part);
  });
  row.insertCell().append(bar);
  const more = document.createElement("small");
  more.textContent = one.words;
  row.insertCell().append(one.cause, more);
}

// --- several routers ----------------------------------------------------------------------------

function routers(frame) {
  const list = frame.routers || [], isMany = list.length > 1;
  if ($("routers-panel").hidden === isMany) { $("routers-panel").hidden = $("router-label").hidden = !isMany; }
  if (!isMany) return;
  const select = $("router");
  for (let i = select.options.length - 1; i < list.length; i++) select.add(new Option(`router ${i + 1}`, i));
  if (turn % 4 !== 1) return;
  rows("routers", list.map((one) => [
    `${one.router}: ${one.endpoint}`,
    (cell) => {
      cell.textContent = !one.answers ? "does not answer" : one.draining ? "draining" : "ready";
      cell.className = one.answers && !one.draining ? "state-ready" : "state-bad";
    },
    number(one.gpus), number(one.queue), number(one.in), one.answers ? percent(one.att) : "–",
  ]));
}

function clients(frame) {
  rows("clients", frame.clients.map((one) => [`${one.client}`, frame.model || "–", number(one.rate), percent(one.att), percent(one.all), number(one.total)]));
}

// --- controls ----------------------------------------------------------------------------------

function pause(isPaused) {
  superserve.isPaused = isPaused;
  $("pause").setAttribute("aria-pressed", String(isPaused));
  $("pause").textContent = isPaused ? "Go on" : "Pause";
  if (isPaused) missed(); else draw();
}

function restyle() {
  readTheme();
  charts = {};
  draw();
}

// A recording: its frames, one after the other, and a slider.
function playBack(recorded) {
  superserve.isRecorded = true;
  $("save").hidden = true;
  $("seek-label").hidden = false;
  $("seek").max = recorded.length - 1;
  let at = 0;
  const goTo = (n) => {
    at = Math.max(0, Math.min(recorded.length - 1, n));
    all = superserve.frames = recorded.slice(Math.max(0, at - KEPT + 1), at + 1);
    frames = seen(all);
    misses = missesOf(frames);
    $("seek").value = at;
    draw();
  };
  $("seek").addEventListener("input", () => { pause(true); goTo(Number($("seek").value)); });
  setInterval(() => { if (!superserve.isPaused) goTo(at + 1 < recorded.length ? at + 1 : 0); }, 250);
  goTo(Math.min(8, recorded.length - 1));
}

readTheme();
$("parts-legend").replaceChildren(...PARTS.map((name, i) => legendItem(name, i)));
$("router").addEventListener("change", () => show(Number($("router").value)));
$("pause").addEventListener("click", () => pause(!superserve.isPaused));
document.addEventListener("keydown", (event) => {
  if (event.key === "p" && !event.ctrlKey && !event.metaKey && !event.altKey) pause(!superserve.isPaused);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
addEventListener("resize", () => { if ($("rates").clientWidth !== charts.width) { charts = {}; draw(); } });
if ($("recording")) playBack(JSON.parse($("recording").textContent).filter((frame) => !frame.gone));
else {
  const source = new EventSource("stream");
  source.onmessage = (event) => take(JSON.parse(event.data));
  source.onerror = () => sentence("wrong", "No connection to the page's server: is `cluster web` running?");
}
