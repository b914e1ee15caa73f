// The page: a grid of seeds, and a walk between two of them. `worker.js` computes, `latents.js` draws the noise.

import { SeedStream, between } from "./latents.js";

const SEEDS = 2 ** 32;
const $ = (id) => document.getElementById(id);

let model;
let worker;
const waiting = new Map(); // of evaluations, by number
let asked = 0;
const times = []; // milliseconds per image, of the last evaluations

// --- the network

function evaluate(latents, classIndex) {
  const id = asked++;
  worker.postMessage({ id, latents, classes: model.classes ? [classIndex] : null });
  return new Promise((resolve) => waiting.set(id, resolve));
}

function receive({ data }) {
  if (data.error) return fail(data.error);
  if (data.progress !== undefined) {
    $("progress").value = data.progress;
    $("message").textContent = data.progress < 1 ? "Loading the network" : "Starting the network";
  } else if (data.ready) {
    document.body.dataset.state = "ready";
    showGrid();
  } else {
    times.push(data.milliseconds);
    if (times.length > 25) times.shift();
    const median = [...times].sort((a, b) => a - b)[times.length >> 1];
    $("speed").textContent = median < 10 ? median.toFixed(1) : median.toFixed(0);
    waiting.get(data.id)(data.images);
    waiting.delete(data.id);
  }
}

function fail(reason) {
  document.body.dataset.state = "failed";
  const advice = $("device").value === "gpu" ? ". Load the page again to compute on the CPU." : "";
  $("message").textContent = `This page cannot run: ${reason}${advice}`;
}

// Starts the network on the device that is chosen; what an earlier worker was asked for is forgotten.
function startWorker() {
  document.body.dataset.state = "loading";
  worker?.terminate();
  waiting.clear();
  times.length = 0;
  shown++;
  busy = false;
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = receive;
  worker.onerror = (event) => fail(event.message || "the worker did not start");
  worker.postMessage({ start: model, device: $("device").value });
}

// --- noise and images

function start(seed) {
  const stream = new SeedStream(seed);
  const latents = stream.normal(model.channels * model.resolution ** 2);
  const drawn = model.classes ? stream.integer(model.classes) : 0;
  const chosen = $("class").value;
  return { seed, latents, classIndex: chosen === "" ? drawn : Number(chosen) };
}

function draw(canvas, images) {
  const size = model.resolution;
  const pixels = new ImageData(size, size);
  const area = size * size;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) {
      const value = images[(model.channels === 1 ? 0 : c) * area + i];
      pixels.data[4 * i + c] = Math.min(255, Math.max(0, Math.floor(value * 127.5 + 128)));
    }
    pixels.data[4 * i + 3] = 255;
  }
  canvas.width = canvas.height = size;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function copy(source, target) {
  target.width = target.height = model.resolution;
  target.getContext("2d").drawImage(source, 0, 0);
}

function download(canvas, name) {
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

// --- the grid

let shown = 0; // which filling of the grid is the last; an earlier one stops
let tiles = [];

function describe({ seed, classIndex }) {
  return model.classes ? `${seed} · ${model.class_names?.[classIndex] ?? classIndex}` : String(seed);
}

async function showGrid() {
  const mine = ++shown;
  const first = Number($("first").value);
  tiles = Array.from({ length: Math.min(model.images, SEEDS - first) }, (_, i) => {
    const tile = document.createElement("button");
    const name = Object.assign(document.createElement("span"), { className: "name" });
    const canvas = document.createElement("canvas");
    tile.type = "button";
    tile.className = "tile";
    tile.append(canvas, name);
    const entry = { ...start(first + i), tile, canvas };
    canvas.width = canvas.height = model.resolution;
    tile.dataset.seed = entry.seed;
    name.textContent = describe(entry);
    tile.ariaLabel = `Seed ${describe(entry)}`;
    tile.onclick = () => choose(entry);
    return entry;
  });
  $("grid").replaceChildren(...tiles.map(({ tile }) => tile));
  ends = [tiles[0], tiles[1] ?? tiles[0]];
  showEnds();
  for (const entry of tiles) {
    const images = await evaluate(entry.latents, entry.classIndex);
    if (mine !== shown) return;
    draw(entry.canvas, images);
    entry.tile.dataset.done = "";
    if (ends.includes(entry)) showEnds();
  }
  $("grid").dataset.first = first; // the seeds that are there, whole
}

// --- the walk

let ends = []; // A and B
let turn = 0; // which of them the next click on the grid replaces
let wanted = false;
let busy = false;

function choose(entry) {
  ends[turn] = entry;
  turn = 1 - turn;
  showEnds();
}

function showEnds() {
  for (const { tile } of tiles) tile.classList.remove("a", "b");
  for (const [i, id] of ["from", "to"].entries()) {
    const entry = ends[i];
    entry.tile.classList.add("ab"[i]);
    copy(entry.canvas, $(id));
    $(`${id}-seed`).textContent = describe(entry);
  }
  walk();
}

// The image at the slider. While one is computed, only the last position that was asked for waits.
async function walk() {
  wanted = true;
  if (busy || document.body.dataset.state !== "ready") return;
  busy = true;
  while (wanted) {
    wanted = false;
    const t = Number($("slider").value) / 100;
    const [a, b] = ends;
    const nearest = t < 0.5 ? a : b; // a walk between classes changes the class half way
    const images = await evaluate(between(a.latents, b.latents, t), nearest.classIndex);
    draw($("between"), images);
    $("between").dataset.position = `${a.seed} ${b.seed} ${t}`;
  }
  busy = false;
}

let direction = 1;
let before = 0;

function step(now) {
  if ($("play").ariaPressed !== "true") return;
  const slider = $("slider");
  if (!busy && now - before > 40) {
    before = now;
    const value = Number(slider.value) + direction;
    if (value >= 100 || value <= 0) direction = value >= 100 ? -1 : 1;
    slider.value = value;
    walk();
  }
  requestAnimationFrame(step);
}

// --- controls

function moveTo(first) {
  $("first").value = Math.min(SEEDS - 1, Math.max(0, Math.floor(first) || 0));
  showGrid();
}

function connect() {
  $("slider").oninput = walk;
  $("play").onclick = () => {
    const playing = $("play").ariaPressed !== "true";
    $("play").ariaPressed = playing;
    $("play").textContent = playing ? "Pause" : "Play";
    if (playing) requestAnimationFrame(step);
  };
  $("first").onchange = () => moveTo(Number($("first").value));
  $("class").onchange = showGrid;
  $("device").onchange = startWorker;
  $("more").onclick = () => moveTo(Number($("first").value) + model.images);
  $("random").onclick = () => moveTo(Math.random() * (SEEDS - model.images));
  $("save").onclick = () => download($("between"), `${ends[0].seed}-${ends[1].seed}-${$("slider").value}.png`);
  $("save-grid").onclick = () => {
    const columns = Math.ceil(Math.sqrt(tiles.length));
    const sheet = document.createElement("canvas");
    sheet.width = columns * model.resolution;
    sheet.height = Math.ceil(tiles.length / columns) * model.resolution;
    const context = sheet.getContext("2d");
    for (const [i, { canvas }] of tiles.entries()) {
      context.drawImage(canvas, (i % columns) * model.resolution, Math.floor(i / columns) * model.resolution);
    }
    download(sheet, `seeds-${tiles[0].seed}.png`);
  };
}

function showFacts() {
  document.title = $("title").textContent = model.title;
  const color = model.channels === 1 ? "gray" : "colour";
  const facts = [
    [`${model.resolution} × ${model.resolution}`, color],
    [(model.parameters / 1e6).toFixed(1), "million weights"],
    [(model.bytes / 1e6).toFixed(1), "MB"],
    ["", "ms per image"],
  ];
  if (model.classes) facts.splice(1, 0, [String(model.classes), "classes"]);
  for (const [value, name] of facts) {
    const item = document.createElement("li");
    const number = Object.assign(document.createElement("strong"), { textContent: value || "–" });
    if (!value) number.id = "speed";
    item.append(number, " ", Object.assign(document.createElement("span"), { textContent: name }));
    $("facts").append(item);
  }
  if (model.classes) {
    $("class-label").hidden = false;
    $("class").append(new Option("of the seed", ""));
    for (let i = 0; i < model.classes; i++) $("class").append(new Option(model.class_names?.[i] ?? String(i), i));
  }
}

try {
  const response = await fetch("model.json");
  if (!response.ok) throw new Error(`model.json: status ${response.status}`);
  model = await response.json();
  showFacts();
  connect();
  startWorker();
  $("device-label").hidden = !navigator.gpu; // whether it has an adapter shows when it is chosen
} catch (error) {
  fail(error.message);
}
