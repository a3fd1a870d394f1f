"use strict";
// Whatever comes from a file or a server is put on the page by textContent alone; the page's policy forbids all else.
const $ = (id) => document.getElementById(id);
const MIB = 2 ** 20;
const RUNS_SHOWN = 8;
const RUN = { first: "first", question: "other question", again: "again" };
const page = { state: null, clip: null, stopper: null, drawing: false, taking: null };
// names this page's videos to the server's caches, so that "first" is true after a reload, too
const session = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

// --- the local server

/** The answer's JSON. Throws an Error whose message is for the user. */
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("flashvid play does not answer: is it still running in its terminal?");
  }
  if (response.ok) return response;
  let message = "";
  try {
    message = (await response.json()).error;
  } catch {
    // no JSON: the status must do
  }
  throw new Error(message || `flashvid play answers HTTP ${response.status}`);
}

const post = (path, body, signal) =>
  call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });

/** Every line of a streamed answer, as an object. */
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

// --- the clip

function choose(clip) {
  page.clip = clip;
  show($("clip-error"), "");
  $("name").textContent = clip ? `${clip.name} · ${(clip.bytes / MIB).toFixed(clip.bytes < MIB ? 2 : 1)} MiB` : "Drop a video here, or choose one.";
  $("video").hidden = !clip;
  if (clip) $("video").src = `api/clips/${clip.id}`;
  else $("video").removeAttribute("src");
  if (!clip || !clip.sample) $("sample").value = "";
  stale();
}

async function upload(file) {
  if (page.taking) return;
  show($("clip-error"), "");
  if (page.state && file.size > page.state.most_bytes) {
    const [size, most] = [(file.size / MIB).toFixed(1), page.state.most_bytes / MIB];
    return show($("clip-error"), `${file.name} has ${size} MiB, and at most ${most} MiB are taken: cut it shorter, or start flashvid play with a larger --max-upload-mib`);
  }
  $("name").textContent = `taking ${file.name} …`;
  page.taking = file;
  try {
    const response = await call(`api/clips?name=${encodeURIComponent(file.name)}`, {
      method: "POST", headers: { "content-type": "application/octet-stream" }, body: file,
    });
    choose(await response.json());
  } catch (error) {
    choose(page.clip);
    show($("clip-error"), error.message);
  } finally {
    page.taking = null;
  }
}

// --- a column

class Column {
  constructor(id, settings) {
    this.root = $(id);
    this.settings = settings;
    this.root.append($("answer").content.cloneNode(true));
    this.part = (selector) => this.root.querySelector(selector);
    this.seen = new Set(); // clips with settings, and prompts, that were sent
    this.last = null; // the figures of the last whole answer
    this.shown = null; // the request that the figures and the answer belong to
    this.part(".one").addEventListener("click", () => ask([this]));
    this.part(".answer").setAttribute("aria-label", `answer, ${this.part("h2").textContent.toLowerCase()}`);
  }

  request() {
    const most = $("most").valueAsNumber;
    return {
      clip: page.clip.id, session, model: $("model").value, question: $("question").value,
      settings: this.settings(), max_tokens: Number.isInteger(most) ? most : null,
    };
  }

  /** What of a request was left empty, in words. */
  missing(request) {
    if (!request.question.trim()) return "Type a question first.";
    if (request.max_tokens === null) return "Give the longest answer as a whole number of tokens.";
    if (request.settings.token_budget === null) return "Give the budget as a whole number of tokens.";
    return "";
  }

  /** What the caches may have of a request. */
  kind(request) {
    const video = JSON.stringify([request.clip, request.model, request.settings]);
    const prompt = JSON.stringify([video, request.question]);
    const kind = this.seen.has(prompt) ? "again" : this.seen.has(video) ? "question" : "first";
    this.seen.add(video).add(prompt);
    return kind;
  }

  /** Ask, and show what comes. */
  async run(signal) {
    const request = this.request();
    const missing = this.missing(request);
    if (missing) return show(this.part(".error"), missing);
    const kind = this.kind(request);
    this.shown = JSON.stringify(request);
    this.last = null;
    this.root.classList.remove("stale");
    this.root.setAttribute("aria-busy", "true");
    show(this.part(".error"), "");
    this.part(".answer").textContent = "";
    for (const name of ["prompt", "first", "speed"]) this.part(`.${name}`).textContent = "–";
    const start = performance.now();
    const tick = setInterval(() => {
      this.part(".wait").textContent = `waiting for the first token: ${((performance.now() - start) / 1000).toFixed(1)} s`;
    }, 100);
    let first = null, end = null;
    try {
      for await (const line of lines(await post("api/ask", request, signal))) {
        if ("error" in line) throw new Error(line.error);
        if ("first_s" in line) {
          clearInterval(tick);
          first = line.first_s;
          this.part(".first").textContent = seconds(first);
          this.part(".wait").textContent = "answering …";
        }
        if ("thought" in line) this.add(line.thought, "thought");
        if ("text" in line) this.add(line.text, "");
        if ("prompt_tokens" in line) end = line;
      }
      if (!end) throw new Error("the answer broke off");
      this.finish(kind, first, end, request.settings);
    } catch (error) {
      if (error.name === "AbortError") this.part(".wait").textContent = "stopped";
      else show(this.part(".error"), error instanceof TypeError ? "flashvid play stopped answering: is it still running in its terminal?" : error.message);
    } finally {
      clearInterval(tick);
      this.root.removeAttribute("aria-busy");
      if (this.part(".wait").textContent !== "stopped") this.part(".wait").textContent = "";
    }
  }

  add(text, kind) {
    const answer = this.part(".answer");
    const below = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 30;
    let piece = answer.lastElementChild;
    if (!piece || piece.className !== kind) {
      piece = answer.appendChild(document.createElement("span"));
      piece.className = kind;
    }
    piece.append(text); // a string becomes a text node
    if (below) answer.scrollTop = answer.scrollHeight;
  }

  finish(kind, first, end, settings) {
    this.last = { kind, first, prompt: end.prompt_tokens, settings };
    const prompt = this.part(".prompt");
    prompt.textContent = end.prompt_tokens.toLocaleString("en");
    if (end.cached_tokens !== null) note(prompt, `${end.cached_tokens.toLocaleString("en")} of them cached`);
    note(this.part(".first"), RUN[kind]);
    const speed = end.tokens_per_s === null ? "–" : end.tokens_per_s.toFixed(1);
    this.part(".speed").textContent = speed;
    note(this.part(".speed"), `${end.completion_tokens} tokens in all`);
    if (!this.part(".answer").textContent.trim()) this.add("no text: the tokens of this answer are none that can be read", "nothing");
    const row = document.createElement("tr");
    for (const text of [RUN[kind], brief(settings), end.prompt_tokens.toLocaleString("en"), seconds(first), speed])
      row.appendChild(document.createElement("td")).textContent = text;
    const body = this.part("tbody");
    body.prepend(row);
    if (body.rows.length > RUNS_SHOWN) body.lastElementChild.remove();
    this.part("table").hidden = false;
  }

  /** Say what would be sent, and whether what is shown was asked so. */
  describe() {
    this.part(".sent code").textContent = `"mm_processor_kwargs": {"flashvid": ${JSON.stringify(this.settings()).replace(/([:,])/g, "$1 ")}}`;
    const request = page.clip ? JSON.stringify(this.request()) : null;
    this.root.classList.toggle("stale", this.shown !== null && this.shown !== request);
    this.part(".one").textContent = this.shown !== null && this.shown === request ? "Ask again" : "Ask this one";
  }
}

function note(parent, text) {
  parent.appendChild(document.createElement("small")).textContent = text;
}

const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`;

function brief(settings) {
  if (settings.enabled === false) return "plain";
  const size = "token_budget" in settings ? `${settings.token_budget} tokens` : `${Math.round(100 * settings.retention_ratio)} %`;
  const parts = [size, ...(settings.method === "flashvid" ? [] : [settings.method])];
  if ("encoder_ratio" in settings) parts.push(`encoder ${settings.encoder_ratio === "auto" ? "auto" : `${100 * settings.encoder_ratio} %`}`);
  return parts.join(", ");
}

// --- both columns

function compression() {
  const rest = { method: $("method").value || "flashvid" };
  const share = $("encoder").value;
  if (share) rest.encoder_ratio = share === "auto" ? share : Number(share);
  if (document.querySelector('input[name="size"]:checked').value === "ratio")
    return { retention_ratio: $("ratio").valueAsNumber / 100, ...rest };
  const budget = $("budget").valueAsNumber;
  return { token_budget: Number.isInteger(budget) ? budget : null, ...rest };
}

const plain = new Column("plain", () => ({ enabled: false }));
const compressed = new Column("compressed", compression);
const columns = [plain, compressed];

async function ask(asked) {
  if (page.stopper) return;
  if (page.taking) return show($("clip-error"), "Wait until the clip is taken.");
  if (!page.clip) return show($("clip-error"), "Choose a clip first: drop one, or take a sample.");
  page.stopper = new AbortController();
  busy(true);
  $("verdict").textContent = "";
  const { signal } = page.stopper;
  try {
    if (document.querySelector('input[name="order"]:checked').value === "once" || asked.length === 1)
      await Promise.all(asked.map((column) => column.run(signal)));
    else
      for (const column of asked) if (!signal.aborted) await column.run(signal);
  } finally {
    page.stopper = null;
    busy(false);
    verdict();
    stale();
  }
}

/** The two last answers in one sentence, if they are to the same question about the same clip. */
function verdict() {
  const [a, b] = [plain.last, compressed.last];
  if (!a || !b || pair(plain.shown) !== pair(compressed.shown)) return void ($("verdict").textContent = "");
  if (b.prompt >= a.prompt && (b.settings.retention_ratio ?? 0) < 0.9 && !("token_budget" in b.settings))
    return void ($("verdict").textContent = "The prompt was not compressed: does the server run with --plugin flashvid?");
  const parts = [`Compressed: ${((100 * b.prompt) / a.prompt).toFixed(0)} % of the plain prompt’s tokens`];
  if (a.kind === b.kind) parts.push(`first token after ${(b.first / a.first).toFixed(2)} × its time (${RUN[a.kind]})`);
  else parts.push(`times not comparable (${RUN[a.kind]}, ${RUN[b.kind]})`);
  $("verdict").textContent = `${parts.join(", ")}.`;
}

const pair = (shown) => JSON.stringify({ ...JSON.parse(shown), settings: null });

function busy(is) {
  for (const button of document.querySelectorAll("#ask, .one")) button.disabled = is;
  $("stop").disabled = !is;
  document.body.classList.toggle("busy", is);
}

/** After any change: what is shown may belong to another request. */
function stale() {
  $("ratio-shown").textContent = `${$("ratio").value} %`;
  const once = document.querySelector('input[name="order"]:checked').value === "once";
  $("order-note").textContent = once
    ? "Both share the server: each is slower than alone, by how much depends on the other."
    : "Plain first; each has the server to itself, if nobody else asks.";
  if (!page.stopper) for (const column of columns) column.describe();
  const again = columns.every((column) => column.shown && !column.root.classList.contains("stale"));
  $("ask").textContent = again ? "Ask both again" : "Ask both";
  if (!page.state) return;
  $("draw").disabled = page.drawing || !page.clip;
  if ($("picture").dataset.of && $("picture").dataset.of !== drawn()) $("kept-note").textContent = "The picture below is of other settings or another clip.";
}

// --- kept tokens

const drawn = () => JSON.stringify([page.clip && page.clip.id, compression()]);

async function draw() {
  page.drawing = true;
  show($("kept-error"), "");
  $("kept-note").textContent = "encoding and drawing …";
  stale();
  const of = drawn();
  try {
    const found = await (await post("api/kept", { clip: page.clip.id, settings: compression() })).json();
    const frame = document.createElement("iframe");
    frame.setAttribute("sandbox", "allow-scripts");
    frame.title = "kept tokens over the frames";
    frame.src = `api/kept/${found.id}`;
    $("alone").href = frame.src;
    $("alone").hidden = false;
    $("picture").replaceChildren(frame);
    $("picture").dataset.of = of;
    $("kept-note").textContent = `${found.kept} of ${found.total} tokens, through ${page.state.tower}, from up to ${page.state.frames} frames at even distances, with the model family’s preset; the server may take other frames, or be started with other settings.`;
  } catch (error) {
    $("kept-note").textContent = "";
    show($("kept-error"), error.message);
  } finally {
    page.drawing = false;
    stale();
  }
}

// --- the page

async function start() {
  $("recheck").hidden = true;
  show($("trouble"), "");
  $("server").textContent = "looking for the server …";
  try {
    page.state = await (await call("api/state")).json();
  } catch (error) {
    $("server").textContent = "";
    $("recheck").hidden = false;
    return show($("trouble"), error.message);
  }
  const state = page.state;
  options($("method"), state.methods.map((name) => [name, name]), $("method").value || "flashvid");
  options($("sample"), [["", "…"], ...state.samples.map((clip) => [clip.id, clip.name])], $("sample").value);
  $("samples").hidden = !state.samples.length;
  if (!page.clip && state.samples.length) ($("sample").value = state.samples[0].id), choose(state.samples[0]);
  options($("model"), state.models.map((name) => [name, name]), $("model").value);
  $("models").hidden = state.models.length < 2;
  $("most").max = state.most_tokens;
  $("draw").hidden = !state.tower;
  if (!state.tower) $("kept-note").textContent = "Start flashvid play with --model DIR (a served model’s directory or name) or --clip DIR (a CLIP model) to draw over the frames which tokens are kept.";
  $("server").textContent = state.models.length === 1 ? `${state.models[0]} at ${state.base_url}` : state.base_url;
  stale();
  let trouble = state.error;
  if (!trouble) {
    try {
      await post("api/check", { model: $("model").value });
    } catch (error) {
      trouble = error.message;
    }
  }
  show($("trouble"), trouble ?? "");
  $("recheck").hidden = !trouble;
}

function options(select, pairs, chosen) {
  select.replaceChildren(
    ...pairs.map(([value, text]) => {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = text;
      return option;
    }),
  );
  if (pairs.some(([value]) => value === chosen)) select.value = chosen;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(columns);
});
$("stop").addEventListener("click", () => page.stopper?.abort());
$("recheck").addEventListener("click", start);
$("draw").addEventListener("click", draw);
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) upload(file);
  $("file").value = ""; // so that the same file can be chosen again
});
$("sample").addEventListener("change", () => {
  const clip = page.state.samples.find((sample) => sample.id === $("sample").value);
  if (clip) choose(clip);
});
$("video").addEventListener("error", () => {
  if (page.clip) $("video").hidden = true, ($("name").textContent += " · this browser cannot play it; the server may read it all the same");
});
for (const [input, choice] of [["ratio", "ratio"], ["budget", "budget"]])
  $(input).addEventListener("input", () => (document.querySelector(`input[name="size"][value="${choice}"]`).checked = true));
document.addEventListener("input", stale);
document.addEventListener("change", stale);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") page.stopper?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(columns);
});
let depth = 0; // of elements that a dragged file is over
document.addEventListener("dragenter", () => document.body.classList.toggle("dragging", ++depth > 0));
document.addEventListener("dragleave", () => document.body.classList.toggle("dragging", --depth > 0));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault(); // or the browser leaves for the file
  depth = 0;
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) upload(file);
});
stale();
start();
