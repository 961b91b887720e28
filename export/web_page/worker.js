// Off the page's thread: reads the model, runs its towers by ONNX Runtime Web, tokenises texts and prepares images.

import { prepare } from "./pixels.js";
import { SentencePiece } from "./sentencepiece.js";
import { WordPiece } from "./wordpiece.js";

const TOKENIZERS = { sentencepiece: SentencePiece, wordpiece: WordPiece };
const here = new URL(".", import.meta.url);
let ort, model, tokenizer, towers;

function address(path) {
  return new URL(path, here).href;
}

// A file of the model, whole and as it was built. Where a page may not compute digests (http:// beyond this machine), only whole.
async function read({ path, bytes, sha256 }, arrived) {
  const response = await fetch(address(path));
  if (!response.ok) throw new Error(`${path} cannot be read: the server says ${response.status}.`);
  const content = new Uint8Array(bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes) throw new Error(`${path} is longer than it was built; build the page anew.`);
    content.set(value, at);
    at += value.length;
    arrived(value.length);
  }
  if (at !== bytes) throw new Error(`${path} breaks off after ${at} of ${bytes} bytes; load the page again.`);
  if (self.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
    const found = [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    if (found !== sha256) throw new Error(`${path} is not the file that was built; build the page anew.`);
  }
  return content;
}

// "webgpu" where this build and this browser have it, else "wasm".
async function provider() {
  if (!model.runtimes.webgpu) return "wasm";
  return (await navigator.gpu?.requestAdapter().catch(() => null)) ? "webgpu" : "wasm";
}

async function open(provider, program, contents) {
  ort = await import(address(model.runtimes[provider].script));
  ort.env.logLevel = "error";
  Object.assign(ort.env.wasm, { numThreads: 1, proxy: false, wasmBinary: program.buffer });
  const options = { executionProviders: [provider] };
  if (provider === "wasm" && model.dtype === "float16") {
    // Weights are cast anew in each run, which takes no longer; else they would be kept in float32 too.
    options.extra = { optimization: { disable_specified_optimizers: "ConstantFolding" } };
  }
  const opened = { provider };
  for (const [tower, [graph, data]] of Object.entries(contents)) {
    const path = model[tower].files[1].path.split("/").at(-1); // as the graph calls it
    opened[tower] = await ort.InferenceSession.create(graph, { ...options, externalData: [{ path, data }] });
  }
  return opened;
}

async function start() {
  const response = await fetch(address("model.json"));
  if (!response.ok) throw new Error(`model.json cannot be read: the server says ${response.status}.`);
  model = await response.json();
  const first = await provider();
  const files = [model.runtimes[first].program, model.tokenizer, ...model.image.files, ...model.text.files];
  const total = files.reduce((sum, { bytes }) => sum + bytes, 0);
  let loaded = 0;
  const arrived = (count) => postMessage({ progress: (loaded += count) / total, total });
  const [program, vocabulary, ...rest] = await Promise.all(files.map((file) => read(file, arrived)));
  const contents = { image: rest.slice(0, 2), text: rest.slice(2) };
  const { kind, ...record } = JSON.parse(new TextDecoder().decode(vocabulary));
  tokenizer = new TOKENIZERS[kind](record);
  try {
    towers = await open(first, program, contents);
  } catch (error) {
    if (first === "wasm") throw error;
    console.warn("WebGPU is not used:", error);
    towers = await open("wasm", await read(model.runtimes.wasm.program, () => {}), contents);
  }
  await embedImages(new Float32Array(3 * model.image.size[0] * model.image.size[1]), 1); // the first run of each takes longer
  await embedTexts([""]);
  return { model, provider: towers.provider };
}

// One run at a time: a session does not take a second one while it is at work.
let last = Promise.resolve();
function inTurn(work) {
  const result = last.then(work);
  last = result.catch(() => null);
  return result;
}

async function run({ input, output, tower }, tensor) {
  const found = await inTurn(() => towers[tower].run({ [input]: tensor }));
  const { data, dims } = found[output];
  return Array.from({ length: dims[0] }, (_, i) => data.slice(i * dims[1], (i + 1) * dims[1]));
}

function embedImages(values, count) {
  return run({ ...model.image, tower: "image" }, new ort.Tensor("float32", values, [count, ...model.image.size, 3]));
}

async function embedTexts(texts) {
  const rows = texts.map((text) => tokenizer.encode(text));
  const ids = new Int32Array(rows.length * tokenizer.length);
  rows.forEach((row, i) => ids.set(row.ids, i * tokenizer.length));
  const embeddings = await run({ ...model.text, tower: "text" }, new ort.Tensor("int32", ids, [rows.length, tokenizer.length]));
  return rows.map(({ cut, unknown }, i) => ({ embedding: embeddings[i], cut, unknown }));
}

async function embedImage(bitmap) {
  const began = performance.now();
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.fillStyle = "white"; // behind what is transparent: a canvas does not keep the colours there
  canvas.fillRect(0, 0, width, height);
  canvas.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = canvas.getImageData(0, 0, width, height).data;
  const [embedding] = await embedImages(prepare(rgba, height, width, model.image.size, model.image.pixels), 1);
  return { embedding, milliseconds: performance.now() - began };
}

const WORK = { start, texts: embedTexts, image: embedImage };

self.addEventListener("message", async ({ data: { id, kind, value } }) => {
  try {
    postMessage({ id, result: await WORK[kind](value) });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
});
