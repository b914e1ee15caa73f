// The network, beside the page, so that the page answers while it computes. Messages in: {start: model.json, device: "cpu" or "gpu"} once,
// then
// {id, latents, classes}; out: {progress}, {ready}, {id, images, milliseconds}, {error}.

let ort;
let session;
let shape;

async function download(url, bytes) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: status ${response.status}`);
  const data = new Uint8Array(bytes);
  const reader = response.body.getReader();
  let done = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (done + part.value.length > bytes) throw new Error(`${url} is not the file that model.json describes`);
    data.set(part.value, done);
    done += part.value.length;
    postMessage({ progress: done / bytes });
  }
  if (done !== bytes) throw new Error(`${url} broke off after ${done} of ${bytes} bytes`);
  return data;
}

async function start(model, device) {
  const url = (name) => new URL(name, self.location.href).href;
  const runtime = model.runtime[device];
  ort = await import(url(runtime.script));
  ort.env.wasm.numThreads = 1; // more take headers that static hosts do not send
  ort.env.wasm.wasmPaths = { wasm: url(runtime.wasm) };
  session = await ort.InferenceSession.create(await download(url(model.model), model.bytes), {
    executionProviders: [device === "gpu" ? "webgpu" : "wasm"],
    logSeverityLevel: 3, // errors; not which operators stay on the CPU
  });
  shape = [model.channels, model.resolution, model.resolution];
  await run(new Float32Array(shape.reduce((a, b) => a * b)), model.classes ? [0] : null); // the first call is slower
}

async function run(latents, classes) {
  const n = latents.length / shape.reduce((a, b) => a * b);
  const feeds = { latents: new ort.Tensor("float32", latents, [n, ...shape]) };
  if (classes) feeds.classes = new ort.Tensor("int64", BigInt64Array.from(classes, BigInt), [n]);
  const started = performance.now();
  const images = (await session.run(feeds)).images.data;
  return { images, milliseconds: (performance.now() - started) / n };
}

let turn = Promise.resolve(); // one evaluation after the other

onmessage = ({ data }) => {
  turn = turn
    .then(async () => {
      if (data.start) {
        await start(data.start, data.device);
        postMessage({ ready: true });
      } else {
        postMessage({ id: data.id, ...(await run(data.latents, data.classes)) });
      }
    })
    .catch((error) => postMessage({ error: String(error.message ?? error) }));
};
