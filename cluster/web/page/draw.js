"use strict";
// The two panels that are drawn: the slack river and the lanes of GPUs. Colours are the page's.

const theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["page", "box", "ink", "muted", "grid", "good", "warn", "bad", "in", "ok", "river"])
    theme[name] = style.getPropertyValue("--" + name).trim();
  theme.subnets = Array.from({ length: 8 }, (_, i) => style.getPropertyValue("--s" + i).trim());
}

// Returns the context of a canvas that is as sharp as the screen; its size in page pixels.
function sized(canvas) {
  const ratio = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, w, h);
  context.font = "11px system-ui, sans-serif";
  return [context, w, h];
}

const LONGEST_S = 60, SHORTEST_S = 20, LEFT = 52, BOTTOM = 18, ACCURACY_H = 60;

// The queue over the last minute as columns of time to deadline, and above them the accuracy served.
function drawRiver(canvas, frames) {
  const [c, w, h] = sized(canvas);
  if (!frames.length) return;
  const now = frames[frames.length - 1].t, top = ACCURACY_H + 22, room = h - BOTTOM - top, wide = w - LEFT;
  const seconds = Math.min(LONGEST_S, Math.max(SHORTEST_S, (now - frames[0].t) / 1000));
  const recent = frames.filter((f) => f.river && f.t > now - seconds * 1000);
  let most = 1, reach = 10;
  for (const f of recent) {
    const counts = f.river.counts;
    for (let i = 0; i < counts.length; i++)
      if (counts[i]) {
        reach = Math.max(reach, (i + 1) * f.river.width_ms);
        most = Math.max(most, counts[i] / f.river.width_ms);
      }
  }
  const x = (t) => LEFT + wide * (1 - (now - t) / (seconds * 1000)), y = (ms) => h - BOTTOM - (room * ms) / reach;
  const step = wide / (seconds * 4);
  for (const f of recent) {
    const { counts, width_ms } = f.river, at = x(f.t) - step;
    for (let i = 0; i < counts.length; i++)
      if (counts[i]) {
        // By the square root: a few queries that wait must be seen beside a burst.
        c.fillStyle = `rgba(${theme.river}, ${0.18 + 0.82 * Math.sqrt(counts[i] / width_ms / most)})`;
        c.fillRect(at, y((i + 1) * width_ms), step + 0.6, (room * width_ms) / reach + 0.4);
      }
  }
  c.strokeStyle = theme.bad;
  c.lineWidth = 1.5;
  c.beginPath();
  let isFirst = true;
  for (const f of recent) {
    const at = x(f.t), edge = y(f.river.quickest_ms);
    if (isFirst) c.moveTo(at, edge); else c.lineTo(at, edge);
    isFirst = false;
  }
  c.stroke();
  axes(c, w, h, room, reach, seconds);
  drawAccuracy(c, recent, frames[frames.length - 1].accuracies, x, w);
}

function axes(c, w, h, room, reach, seconds) {
  c.fillStyle = theme.muted;
  c.textAlign = "right";
  for (const share of [0, 0.5, 1]) {
    const at = h - BOTTOM - room * share;
    c.fillText(`${(reach * share).toFixed(0)} ms`, LEFT - 6, at + 4);
    c.fillStyle = theme.grid;
    c.fillRect(LEFT, at, w - LEFT, 0.5);
    c.fillStyle = theme.muted;
  }
  c.textAlign = "left";
  c.fillText(`${seconds.toFixed(0)} s ago`, LEFT, h - 4);
  c.textAlign = "right";
  c.fillText("now", w - 2, h - 4);
}

function drawAccuracy(c, frames, accuracies, x, w) {
  if (!accuracies || !accuracies.length) return;
  const low = accuracies[0], high = accuracies[accuracies.length - 1] + 1e-9;
  const y = (a) => 6 + (ACCURACY_H - 10) * (1 - (a - low) / (high - low || 1));
  c.fillStyle = theme.muted;
  c.textAlign = "right";
  c.fillText(`${high.toFixed(1)} %`, LEFT - 6, 12);
  c.fillText(`${low.toFixed(1)} %`, LEFT - 6, ACCURACY_H);
  c.fillStyle = theme.grid;
  c.fillRect(LEFT, ACCURACY_H + 4, w - LEFT, 0.5);
  c.strokeStyle = theme.good;
  c.lineWidth = 1.8;
  c.beginPath();
  let isOn = false;
  for (const f of frames) {
    if (f.served_accuracy === null) { isOn = false; continue; }
    const at = x(f.t), height = y(f.served_accuracy);
    if (isOn) c.lineTo(at, height); else c.moveTo(at, height);
    isOn = true;
  }
  c.stroke();
}

const LANES_S = 2;

// The batches of the last two seconds, a lane for each GPU.
function drawLanes(canvas, frames) {
  const last = frames[frames.length - 1], n = last ? last.gpus.length : 0;
  if (!n) { sized(canvas); return; }
  const shown = Math.min(n, 32);
  canvas.style.height = `${Math.max(90, shown * Math.max(22, Math.min(44, 200 / shown)) + BOTTOM + 4)}px`;
  const [c, w, h] = sized(canvas), wide = w - 92, lane = (h - BOTTOM) / shown;
  const from = last.t - LANES_S * 1000, x = (t) => 92 + (wide * (t - from)) / (LANES_S * 1000);
  c.fillStyle = theme.muted;
  c.textAlign = "right";
  for (let i = 0; i < shown; i++) {
    c.fillText(last.gpus[i].slice(-14), 86, i * lane + lane / 2 + 4);
    c.fillRect(92, i * lane + lane / 2, wide, 0.3);
  }
  for (let k = Math.max(0, frames.length - 16); k < frames.length; k++)
    for (const [gpu, start, took, subnet, size] of frames[k].batches) {
      if (gpu >= shown || start + took < from) continue;
      const left = Math.max(92, x(start)), right = Math.min(w, x(start + took));
      c.fillStyle = theme.subnets[subnet % 8];
      c.fillRect(left, gpu * lane + 3, Math.max(0.8, right - left - 0.5), lane - 6);
      if (right - left > 22 && lane > 13) {
        c.fillStyle = theme.page;
        c.textAlign = "left";
        c.fillText(size, left + 3, gpu * lane + lane / 2 + 4);
      }
    }
  c.fillStyle = theme.muted;
  c.textAlign = "left";
  c.fillText("2 s ago", 92, h - 4);
  c.textAlign = "right";
  c.fillText("now", w - 2, h - 4);
}
