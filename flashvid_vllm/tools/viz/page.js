"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [T, H, W] = data.grid;
const N = H * W;
const $ = (id) => document.getElementById(id);
const state = { frame: 0, lit: -1, held: -1, cell: null, tint: 0.4, hatched: true };
const canvases = []; // { canvas, frame(): which frame it shows }

function make(tag, parent, className = "", text = "") {
  const element = parent.appendChild(document.createElement(tag));
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

// --- one frame

function draw({ canvas, frame }) {
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.clearRect(0, 0, width, height);
  const t = frame();
  const at = (y, x) => (y < 0 || x < 0 || y >= H || x >= W ? -2 : data.assignment[t * N + y * W + x]);
  const line = Math.max(0.8, Math.min(2.5, Math.min(width / W, height / H) / 10)); // thinner in small pictures
  const snap = (i, count, length) => Math.round((i / count) * length * scale) / scale; // no seams between cells
  const edges = new Map(); // colour -> lines around its regions
  for (let y = 0; y < H; y++) {
    for (let x = 0; x < W; x++) {
      const row = at(y, x);
      const [x0, y0, x1, y1] = [snap(x, W, width), snap(y, H, height), snap(x + 1, W, width), snap(y + 1, H, height)];
      const hidden = row < 0 || (state.lit >= 0 && row !== state.lit);
      if (hidden) {
        ctx.fillStyle = row < 0 && state.lit < 0 ? "rgba(8,9,12,0.72)" : "rgba(8,9,12,0.76)";
        ctx.fillRect(x0, y0, x1 - x0, y1 - y0);
        continue;
      }
      if (data.size[row] < 2) continue;
      ctx.globalAlpha = state.tint;
      ctx.fillStyle = data.colour[row];
      ctx.fillRect(x0, y0, x1 - x0, y1 - y0);
      ctx.globalAlpha = 1;
      if (!edges.has(data.colour[row])) edges.set(data.colour[row], new Path2D());
      const path = edges.get(data.colour[row]), h = line / 2; // half inside, so that neighbours show both
      if (at(y - 1, x) !== row) path.moveTo(x0, y0 + h), path.lineTo(x1, y0 + h);
      if (at(y + 1, x) !== row) path.moveTo(x0, y1 - h), path.lineTo(x1, y1 - h);
      if (at(y, x - 1) !== row) path.moveTo(x0 + h, y0), path.lineTo(x0 + h, y1);
      if (at(y, x + 1) !== row) path.moveTo(x1 - h, y0), path.lineTo(x1 - h, y1);
    }
  }
  if (data.copied.length && state.hatched) hatch(ctx, data.copied[t], width, height);
  ctx.lineWidth = line;
  for (const [colour, path] of edges) (ctx.strokeStyle = colour), ctx.stroke(path);
  data.source_index.forEach((source, row) => {
    if (Math.floor(source / N) !== t || (state.lit >= 0 && row !== state.lit)) return;
    const [y, x] = [Math.floor((source % N) / W), source % W];
    const strong = line * (data.size[row] > 1 ? 1.8 : 1.2), inset = line * 1.8 + strong / 2;
    const box = [(x * width) / W + inset, (y * height) / H + inset, width / W - 2 * inset, height / H - 2 * inset];
    ctx.lineWidth = strong + line;
    ctx.strokeStyle = "rgba(0,0,0,0.6)";
    ctx.strokeRect(...box);
    ctx.lineWidth = strong;
    ctx.strokeStyle = data.colour[row];
    ctx.strokeRect(...box);
  });
}

/** Lines over the patches that the encoder copies. */
function hatch(ctx, copied, width, height) {
  const [rows, columns, gap] = [copied.length, copied[0].length, 6];
  const area = new Path2D(), lines = new Path2D();
  copied.forEach((row, y) =>
    row.forEach((is, x) => is && area.rect((x * width) / columns, (y * height) / rows, width / columns, height / rows)),
  );
  for (let x = -height; x < width; x += gap) lines.moveTo(x, height), lines.lineTo(x + height, 0);
  ctx.save();
  ctx.clip(area);
  for (const [colour, thick] of [["rgba(0,0,0,0.35)", 1.8], ["rgba(255,255,255,0.5)", 0.7]])
    (ctx.strokeStyle = colour), (ctx.lineWidth = thick), ctx.stroke(lines);
  ctx.restore();
}

/** "31 of 196 encoded" of a frame, or nothing where all are. */
function encoded(t) {
  if (!data.copied.length) return "";
  const cells = data.copied[t].flat();
  return ` · ${cells.filter((is) => !is).length} of ${cells.length} encoded`;
}

function addFrame(parent, frame) {
  const image = make("img", parent);
  image.alt = "";
  const entry = { canvas: make("canvas", parent), frame, image };
  canvases.push(entry);
  const cellOf = (event) => {
    const box = entry.canvas.getBoundingClientRect();
    const clamp = (value, size) => Math.max(0, Math.min(size - 1, Math.floor(value)));
    const y = clamp(((event.clientY - box.top) / box.height) * H, H);
    return frame() * N + y * W + clamp(((event.clientX - box.left) / box.width) * W, W);
  };
  entry.canvas.addEventListener("pointermove", (event) => state.held < 0 && light(cellOf(event)));
  entry.canvas.addEventListener("pointerleave", () => state.held < 0 && light(null));
  entry.canvas.addEventListener("click", (event) => {
    const cell = cellOf(event), row = data.assignment[cell];
    state.held = row === state.held ? -1 : row;
    light(cell);
  });
  return image;
}

// --- what is lit, and which frame is on the stage

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => ((waiting = false), canvases.forEach(draw)));
}

function light(cell) {
  if (cell === state.cell && state.lit === (cell === null ? -1 : data.assignment[cell])) return describe();
  state.cell = cell;
  state.lit = cell === null ? -1 : data.assignment[cell];
  const member = new Set();
  if (state.lit >= 0) data.assignment.forEach((row, i) => row === state.lit && member.add(Math.floor(i / N)));
  document.querySelectorAll(".column").forEach((column, t) => column.classList.toggle("lit", member.has(t)));
  $("timeline").style.setProperty("--lit", state.lit < 0 || data.size[state.lit] < 2 ? "var(--text)" : data.colour[state.lit]);
  describe(member.size);
  redraw();
}

function describe(frames = new Set(data.assignment.flatMap((row, i) => (row === state.lit ? [Math.floor(i / N)] : []))).size) {
  if (state.cell === null) return void ($("token").textContent = "none pointed at");
  const place = (i) => `frame ${Math.floor(i / N) + 1}, row ${Math.floor((i % N) / W) + 1}, column ${(i % W) + 1}`;
  const lines = [place(state.cell), `attention received: ${data.attention[state.cell].toFixed(2)} × the frame's mean`];
  if (state.lit < 0) lines.push("dropped: no token stands for it");
  else {
    const size = data.size[state.lit], source = data.source_index[state.lit];
    lines.push(`output token ${state.lit + 1} of ${data.size.length}` + (source === state.cell ? ", which is kept here" : `, kept at ${place(source)}`));
    lines.push(size === 1 ? "stands for itself alone" : `stands for ${size} tokens in ${frames} frame${frames > 1 ? "s" : ""}`);
  }
  if (state.held >= 0) lines.push("held; Esc lets go");
  $("token").textContent = lines.join("\n");
}

function show(t) {
  state.frame = Math.max(0, Math.min(T - 1, t));
  stageImage.src = data.frames[state.frame].source;
  $("slider").value = state.frame;
  $("when").textContent = `frame ${state.frame + 1} of ${T} · ${data.frames[state.frame].label} · ${data.single[state.frame] + data.several[state.frame]} kept${encoded(state.frame)}`;
  for (const group of [$("timeline").children, $("frames").children])
    [...group].forEach((element, i) => element.classList.toggle("now", i === state.frame));
  redraw();
}

// --- the page

$("title").textContent = data.title;
for (const [name, value] of data.facts) {
  const pair = make("div", $("facts"));
  make("dt", pair, "", name);
  make("dd", pair, "", value);
}
const stageImage = addFrame($("stage"), () => state.frame);
stageImage.addEventListener("load", () => {
  // a tall video must not push the rest off the screen
  $("stage").style.maxWidth = `${(stageImage.naturalWidth / stageImage.naturalHeight) * Math.max(320, window.innerHeight * 0.7)}px`;
  $("frames").style.setProperty("--least", stageImage.naturalHeight > stageImage.naturalWidth ? "150px" : "240px");
  redraw();
});
if (!data.flashvid) $("segments").remove(), $("why").remove();
else $("segments").append(`cuts between ${data.segment[T - 1] + 1} segments, numbered on top`);
if (!data.copied.length) $("copied").remove(), $("hatched").parentElement.remove();
else $("hatched").addEventListener("change", () => ((state.hatched = $("hatched").checked), redraw()));
const most = Math.max(...data.single.map((count, t) => count + data.several[t]), 1);
const every = Math.ceil(T / 32); // labels that fit
for (let t = 0; t < T; t++) {
  const [single, several] = [data.single[t], data.several[t]];
  const first = t === 0 || data.segment[t] !== data.segment[t - 1];
  const column = make("button", $("timeline"), `column${data.segment[t] % 2 ? " even" : ""}${first ? " first" : ""}`);
  column.title = `frame ${t + 1}, ${data.frames[t].label}: ${single} kept as they are, ${several} for several`;
  const area = 106;
  const counts = [["several", several], ["single", single]].map(([name, count]) => {
    make("i", column, `bar ${name}`).style.height = `${(count / most) * area}px`;
    return count;
  });
  if (t % every === 0) {
    make("b", column, "", String(single + several)).style.bottom = `${22 + ((counts[0] + counts[1]) / most) * area}px`;
    make("small", column, "", String(t + 1));
  }
  if (first && data.flashvid) make("em", column, "", String(data.segment[t] + 1));
  column.addEventListener("click", () => show(t));

  const cell = make("div", $("frames"));
  addFrame(make("figure", cell), () => t).src = data.frames[t].source;
  const caption = make("p", cell);
  make("span", caption, "", `${t + 1} · ${data.frames[t].label}`);
  make("span", caption, "", `${single + several} kept${data.flashvid ? ` · segment ${data.segment[t] + 1}` : ""}`);
}
$("slider").max = T - 1;
$("slider").addEventListener("input", () => show(Number($("slider").value)));
function tint() {
  state.tint = $("tint").value / 100;
  // a grey picture lets the trees' colours tell themselves apart
  document.body.style.setProperty("--grey", Math.min(0.85, 2 * state.tint));
  redraw();
}
$("tint").addEventListener("input", tint);
tint();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") (state.held = -1), light(null);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && event.target.type !== "range") show(state.frame + step), event.preventDefault();
});
new ResizeObserver(redraw).observe(document.body);
show(0);
light(null);
