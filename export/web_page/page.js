// The page: what is shown and asked for. What is computed is in worker.js.

import { parseLabels, probabilities, prompted } from "./scores.js";

const MOST_LABELS = 1000, MOST_ROWS = 12, MOST_KEPT = 10_000, MOST_PIXELS = 64_000_000;
const BATCH = 64; // texts that are encoded at once, so that newer ones need not wait for long
const TYPING = 120, SPEAKING = 800; // milliseconds of rest before labels are encoded, and before a result is read out
const TINY = 64; // pixels of a side below which a picture is shown with its pixels sharp

const at = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const texts = new Map(); // prompt -> {embedding, cut, unknown}
let model = null, image = null, newest = 0;

// A worker made of a blob has this page's Content-Security-Policy; one of a plain address would have none.
const script = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })), { type: "module" });
const waiting = new Map();

function ask(kind, value, moved = []) {
  const id = ++ask.count;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, kind, value }, moved);
  });
}
ask.count = 0;

worker.addEventListener("message", ({ data: { id, result, error, progress, total } }) => {
  if (progress !== undefined) {
    at("progress").value = progress;
    at("progress").title = `${Math.round(progress * 100)} % of ${megabytes(total)}`;
    return;
  }
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
});
const started = ask("start");
worker.addEventListener("error", (event) => failed(event.message || "its script cannot be run"));

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function failed(reason) {
  at("status").textContent = `The model cannot be loaded: ${reason}`;
  at("status").className = "warning";
  at("progress").hidden = true;
}

function complain(text) {
  at("problem").textContent = text ?? "";
  at("problem").hidden = !text;
}

function element(name, text, children = []) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

// ---- Labels and results

function later(work, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, milliseconds);
  };
}

const update = () => result().catch((error) => complain(`The labels cannot be compared: ${error.message}`));

async function result() {
  if (!model) return;
  const turn = ++newest;
  if (texts.size > MOST_KEPT) texts.clear();
  at("results").setAttribute("aria-busy", true);
  const { labels, left } = parseLabels(at("labels").value, MOST_LABELS);
  const template = at("prompt").value;
  const placeless = prompted(template, "") === null;
  at("prompt").setAttribute("aria-invalid", placeless);
  at("prompt-note").hidden = !placeless;
  at("labels-note").textContent = left
    ? `Only the first ${MOST_LABELS.toLocaleString("en")} are used; ${left.toLocaleString("en")} more are left out.`
    : "";
  const prompts = labels.map((label) => prompted(template, label) ?? label);
  const missing = [...new Set(prompts)].filter((prompt) => !texts.has(prompt));
  for (let i = 0; i < missing.length; i += BATCH) {
    const some = missing.slice(i, i + BATCH);
    const found = await ask("texts", some);
    some.forEach((prompt, k) => texts.set(prompt, found[k]));
    if (turn !== newest) return; // what was typed since then is on its way
  }
  show(labels, prompts.map((prompt) => texts.get(prompt)));
  at("results").setAttribute("aria-busy", false);
}

function show(labels, encoded) {
  const scores = image && labels.length ? probabilities(image, encoded.map(({ embedding }) => embedding), model) : [];
  const order = labels.map((_, i) => i).sort((a, b) => (scores[b] ?? 0) - (scores[a] ?? 0) || a - b);
  const list = at("results");
  const old = new Map([...list.children].map((row) => [row.dataset.label, row]));
  const rows = order.slice(0, MOST_ROWS).map((i) => {
    const row = old.get(labels[i]) ?? newRow(labels[i]);
    const notes = [
      encoded[i].unknown && "not all of it is in the model's vocabulary",
      encoded[i].cut && "too long: the model reads only its beginning",
    ].filter(Boolean);
    row.querySelector("small").textContent = notes.join("; ");
    row.querySelector(".value").textContent = scores.length ? percent.format(scores[i]) : "–";
    row.dataset.value = scores[i] ?? "";
    return [row, scores[i] ?? 0];
  });
  list.replaceChildren(...rows.map(([row]) => row));
  list.getBoundingClientRect(); // so that the bars of new rows grow from nothing
  for (const [row, score] of rows) row.querySelector(".bar").style.transform = `scaleX(${score})`;
  const hidden = labels.length - rows.length;
  at("results-note").textContent = labels.length
    ? [
        hidden > 0 && `${hidden.toLocaleString("en")} less likely ones are not shown.`,
        !image && "There is no picture yet.",
        model.bias === null ? "Shares of these labels only: they add up to 100 % even if none of them fits." : "Each label by itself.",
      ].filter(Boolean).join(" ")
    : "Type a label to begin.";
  speech = scores.length ? order.slice(0, 2).map((i) => `${labels[i]}, ${percent.format(scores[i])}`).join("; ") : "";
  speak();
}

function newRow(label) {
  const bar = element("span");
  bar.className = "bar";
  const [name, value] = [element("span", label, [element("small")]), element("span")];
  [name.className, value.className] = ["name", "value"];
  const text = element("span", "", [name, value]);
  text.className = "text";
  const row = element("li", "", [bar, text]);
  row.dataset.label = label;
  return row;
}

let speech = "";
const speak = later(() => {
  const text = speech && `Most likely: ${speech}.`;
  if (at("said").textContent !== text) at("said").textContent = text;
}, SPEAKING);

// ---- Pictures

let pictures = 0; // the number of the newest one; an older one that is ready later is not shown

async function embed(source) {
  const bitmap = await createImageBitmap(source, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  if (bitmap.width * bitmap.height > MOST_PIXELS) {
    bitmap.close();
    throw new RangeError(`It has more than ${MOST_PIXELS.toLocaleString("en")} pixels.`);
  }
  const { width, height } = bitmap;
  const found = await ask("image", bitmap, [bitmap]);
  return { ...found, width, height };
}

async function look(source, name) {
  const turn = ++pictures;
  at("results").setAttribute("aria-busy", true);
  stopCamera();
  complain();
  if (!(await started.catch(() => null))) return; // which has been said
  let blob, found;
  try {
    blob = await source;
    found = await embed(blob);
  } catch (error) {
    complain(
      error instanceof RangeError
        ? `${name} is too large. ${error.message}`
        : `${name} is no picture that this browser can read (${error.message}). Try a JPEG or PNG file.`,
    );
    await update();
    return;
  }
  if (turn !== pictures) return;
  const picture = at("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(blob);
  picture.alt = name;
  picture.classList.toggle("tiny", Math.max(found.width, found.height) < TINY);
  picture.hidden = false;
  at("empty").hidden = true;
  for (const button of at("samples").children) button.setAttribute("aria-pressed", button.dataset.name === name);
  embedded(found);
  await update();
}

function embedded({ embedding, milliseconds }) {
  image = embedding;
  fact("Last picture", `${milliseconds.toFixed(1)} ms, from its pixels to its embedding`);
}

let stream = null, asking = false; // whether the reader is being asked for the camera

async function startCamera() {
  if (asking) return;
  const turn = ++pictures;
  complain();
  asking = true;
  try {
    const mine = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
    stream = mine;
    at("video").srcObject = stream;
    await at("video").play();
    if (turn !== pictures || !(await started.catch(() => null))) return stopCamera();
    pressed(true);
    for (const button of at("samples").children) button.setAttribute("aria-pressed", "false");
    watch(mine).catch((error) => {
      if (stream === mine) stopCamera();
      complain(`The camera has ended: ${error.message}`);
    });
  } catch (error) {
    stopCamera();
    complain(`The camera cannot be used: ${error.message}`);
  } finally {
    asking = false;
  }
}

async function watch(mine) {
  while (stream === mine) {
    const found = await embed(at("video"));
    if (stream !== mine) return;
    embedded(found);
    await update();
    await new Promise((resolve) => setTimeout(resolve, 50)); // leaves the device some rest
  }
}

function pressed(on) {
  at("camera").setAttribute("aria-pressed", on);
  at("camera").textContent = on ? "Stop the camera" : "Use the camera";
  at("video").hidden = !on;
  at("picture").hidden = on || !at("picture").src;
  at("empty").hidden = on || Boolean(at("picture").src);
}

function stopCamera() {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = at("video").srcObject = null;
  pressed(false);
}

// The last thing that the camera saw, as a picture.
function lastFrame() {
  const video = at("video"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve));
}

// ---- The model's own words

function fact(name, value) {
  const row = [...at("facts").children].find((each) => each.textContent === name);
  if (row) row.nextElementSibling.textContent = value;
  else at("facts").append(element("dt", name), element("dd", value));
}

async function fetched(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`the server says ${response.status}`);
  return response.blob();
}

function addSample({ file, name }) {
  const picture = element("img");
  Object.assign(picture, { src: file, alt: name });
  picture.addEventListener("load", () => picture.classList.toggle("tiny", picture.naturalWidth < TINY));
  const button = element("button", "", [picture]);
  button.type = "button";
  button.dataset.name = name;
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => look(fetched(file), name));
  at("samples").append(button);
}

async function begin() {
  const { provider } = ({ model } = await started);
  at("progress").hidden = true;
  at("random").hidden = !model.random;
  at("limits").append(...model.limits.map((limit) => element("li", limit)));
  for (const [name, value] of Object.entries(model.facts)) fact(name, value);
  fact("Runs on", provider === "webgpu" ? "the graphics processor, by WebGPU" : "the processor, by WebAssembly");
  if (!at("labels").value) at("labels").value = model.labels.join("\n");
  if (!at("prompt").value) at("prompt").value = model.prompt;
  model.samples.forEach(addSample);
  at("status").textContent = "Ready.";
  const [sample] = model.samples;
  if (!pictures && sample) await look(fetched(sample.file), sample.name);
  else await update();
  document.documentElement.dataset.ready = performance.now();
  if (navigator.serviceWorker) {
    await navigator.serviceWorker.register("sw.js").catch((error) => console.warn("Not kept for use without the server:", error));
    if (await Promise.race([navigator.serviceWorker.ready, new Promise((resolve) => setTimeout(resolve, 60_000))])) {
      at("status").textContent = "Ready, also without a network.";
    }
  }
}

// ---- What the reader does

const rested = later(update, TYPING);
const typed = () => {
  at("results").setAttribute("aria-busy", true);
  rested();
};
at("labels").addEventListener("input", typed);
at("prompt").addEventListener("input", typed);
at("choose").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  if (file) look(file, file.name);
  at("file").value = ""; // so that the same file can be chosen again
});
at("camera").addEventListener("click", () => (stream ? look(lastFrame(), "Picture of the camera") : startCamera()));
if (!navigator.mediaDevices?.getUserMedia) {
  at("camera").disabled = true;
  at("camera").title = "Browsers give a page the camera only over https:// or on this machine itself.";
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) look(file, "Pasted picture");
});
const stage = at("stage");
document.addEventListener("dragover", (event) => event.preventDefault()); // a picture dropped beside it would replace the page
document.addEventListener("drop", (event) => event.preventDefault());
stage.addEventListener("dragover", () => stage.classList.add("over"));
stage.addEventListener("dragleave", () => stage.classList.remove("over"));
stage.addEventListener("drop", ({ dataTransfer }) => {
  stage.classList.remove("over");
  const [file] = dataTransfer.files;
  if (file) look(file, file.name);
  else complain("That is no picture file. Save the picture first, then drop the file.");
});

begin().catch((error) => failed(error.message));
