// The page: a form, a progress bar, the picture. The work is done by worker.js.

const $ = (id) => document.getElementById(id);
const PACKAGE = new URL("../../", import.meta.url);
const MOST_CHIPS = 20;
const query = new URLSearchParams(location.search);
const ort = new URL(`${query.get("ort") ?? "ort"}/`.replace(/\/+$/, "/"), document.baseURI);

let worker = null;
let pending = null;

// A worker with the package open; resolves to what there is to say of the package.
function start() {
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => {
    if ("step" in data) return pending.onStep?.(data.step, data.picture);
    return "error" in data ? pending.reject(new Error(data.error)) : pending.resolve(data);
  };
  worker.onerror = (event) => {
    event.preventDefault();
    pending?.reject(new Error(`worker.js does not run: ${event.message ?? "cannot be read"}`));
  };
  return ask({ open: { base: PACKAGE.href, ort: ort.href } });
}

function ask(message, onStep) {
  return new Promise((resolve, reject) => {
    pending = { resolve, reject, onStep };
    worker.postMessage(message);
  });
}

let opening = start();
let busy = false;

// Draws samples: options {seed, label, count, embedding}, texts but for the bytes of a .npy file.
// Resolves to {latents: Float32Array, shape, picture: {data: RGBA, width, height}}.
async function sample(options, onStep) {
  if (busy) throw new Error("samples are being drawn already");
  busy = true;
  try {
    await opening;
    return (await ask({ sample: options }, onStep)).done;
  } finally {
    busy = false;
  }
}

// Ends what `sample` does, which then rejects.
function cancel() {
  if (!busy) return;
  worker.terminate();
  pending.reject(new Error("cancelled"));
  opening = start();
  opening.catch(report);
}

function report(error) {
  $("error").textContent = error.message;
}

function show({ data, width, height }) {
  const canvas = $("picture");
  canvas.width = width;
  canvas.height = height;
  canvas.style.setProperty("--width", width);
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  canvas.hidden = false;
}

function options(embedding) {
  const { label, count, seed } = Object.fromEntries(new FormData($("form")));
  return { label: label || null, count: count || null, seed: seed || "0", embedding };
}

async function readEmbedding() {
  const [file] = $("embedding").files;
  return file ? new Uint8Array(await file.arrayBuffer()) : null;
}

function setRunning(running) {
  $("sample").disabled = $("fields").disabled = running;
  $("cancel").disabled = !running;
  $("download").disabled = running || $("picture").hidden;
}

async function press() {
  const { steps } = (await opening).about;
  const started = performance.now();
  $("error").textContent = "";
  $("status").textContent = "Loading the network";
  $("progress").value = 0;
  setRunning(true);
  let first = started;
  try {
    const { picture, shape } = await sample(options(await readEmbedding()), (step, partial) => {
      // The first step has loaded the network too: it says nothing about the others.
      if (step === 0) first = performance.now();
      const left = ((performance.now() - first) / step) * (steps - 1 - step) / 1000;
      $("progress").value = (step + 1) / steps;
      const remaining = step === 0 ? "" : `, ${left.toFixed(left < 10 ? 1 : 0)} s left`;
      $("status").textContent = `Step ${step + 1}/${steps}${remaining}`;
      show(partial);
    });
    show(picture);
    const seconds = (performance.now() - started) / 1000;
    $("status").textContent = `${shape[0]} images in ${seconds.toFixed(1)} s`;
  } catch (error) {
    $("status").textContent = "";
    report(error);
  } finally {
    setRunning(false);
  }
}

function download() {
  $("picture").toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = "samples.png";
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

// Buttons that put a label into the text field, or take it out again.
function addChips(names) {
  const field = $("label");
  const chosen = () => field.value.split(",").map((each) => each.trim()).filter(Boolean);
  const chips = names.map((name) => {
    const chip = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    chip.onclick = () => {
      const others = chosen().filter((each) => each !== name);
      field.value = [...others, ...(others.length === chosen().length ? [name] : [])].join(", ");
      mark();
    };
    return chip;
  });
  const mark = () => {
    for (const chip of chips) chip.ariaPressed = String(chosen().includes(chip.textContent));
  };
  field.oninput = mark;
  mark();
  $("chips").replaceChildren(...chips);
}

function describe({ name, sampler, steps, bytes, conditioning, labelNames, hashed }) {
  document.title = $("name").textContent = name;
  const size = `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  const checked = hashed ? "files checked" : "files not checked: this address is not secure";
  $("about").textContent = [sampler, `${steps} steps`, size, checked].join(" · ");
  $("labels").hidden = conditioning.kind !== "label";
  $("embeddings").hidden = conditioning.kind !== "embedding";
  $("counts").hidden = conditioning.kind === "embedding";
  for (const id of ["label", "count", "seed"]) $(id).value = query.get(id) ?? $(id).value;
  if (conditioning.kind === "label") {
    $("label").placeholder = `each of 0 to ${conditioning.n_labels - 1} once`;
    if (labelNames.length <= MOST_CHIPS) addChips(labelNames);
  }
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  press().catch(report);
};
$("cancel").onclick = cancel;
$("download").onclick = download;
window.addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  report(event.reason);
});
window.edgeqdm = { sample, cancel };
try {
  describe((await opening).about);
  setRunning(false);
  if (query.get("auto") === "1") await press();
} catch (error) {
  report(error);
}
