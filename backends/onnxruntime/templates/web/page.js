// The page: a form, a progress bar, the picture. The work is done by worker.js.

const $ = (id) => document.getElementById(id);
const PACKAGE = new URL("../../", import.meta.url);
const MOST_CHIPS = 20;
const CANCELLED = "cancelled";
const query = new URLSearchParams(location.search);

let worker = null;
let pending = null;

// The folder of onnxruntime-web. A link must not be able to run another server's code in the name
// of this one; on the reader's own machine it may.
function ortFolder() {
  const folder = new URL(`${query.get("ort") ?? "ort"}/`.replace(/\/+$/, "/"), document.baseURI);
  if (folder.origin === location.origin) return folder;
  if (["localhost", "127.0.0.1", "[::1]"].includes(location.hostname)) return folder;
  throw new Error(`?ort=${folder} is on another server: only a page on localhost takes that`);
}

// A worker with the package open; resolves to what there is to say of the package.
async function start() {
  const ort = ortFolder();
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => {
    if ("step" in data) pending.onStep?.(data.step, data.picture);
    else if ("error" in data) pending.reject(new Error(data.error));
    else pending.resolve(data);
  };
  worker.onerror = (event) => {
    event.preventDefault();
    pending?.reject(new Error(`worker.js does not run: ${event.message || "cannot be read"}`));
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
// Whether the worker is at a request of the page, and what ends each wait of the page.
let asked = false;
const waits = new Set();

// What `promise` comes to, unless the page is told to cancel before that.
async function unlessCancelled(promise) {
  let stop;
  const cancelled = new Promise((_, reject) => {
    stop = () => reject(new Error(CANCELLED));
  });
  waits.add(stop);
  try {
    return await Promise.race([promise, cancelled]);
  } finally {
    waits.delete(stop);
  }
}

async function request(message, onStep) {
  if (busy) throw new Error("the page is at work already");
  busy = true;
  try {
    await unlessCancelled(opening);
    asked = true;
    return (await unlessCancelled(ask(message, onStep))).done;
  } finally {
    busy = asked = false;
  }
}

// Draws samples: options {seed, label, count, embedding}, texts but for the bytes of a .npy file.
// Resolves to {latents: Float32Array, shape, picture: {data: RGBA, width, height}}.
const sample = (options, onStep) => request({ sample: options }, onStep);

// Replays the golden run; resolves to {passed, reason, deviation [S], sampler}.
const selfTest = (onStep) => request({ selfTest: true }, onStep);

// Ends what the page does; that then rejects.
function cancel() {
  for (const stop of waits) stop();
  if (!asked) return;
  asked = false;
  worker.terminate();
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

const given = (id) => $(id).value.trim() || null;

async function options() {
  const [file] = $("embedding").files;
  return {
    label: given("label"),
    count: given("count"),
    seed: given("seed") ?? "0",
    embedding: file ? new Uint8Array(await file.arrayBuffer()) : null,
  };
}

// What had the focus before it was disabled.
let focused = null;

// While the page is at work, Cancel takes the focus of what is disabled, and gives it back.
function setRunning(running) {
  const held = document.activeElement;
  for (const id of ["sample", "fields", "test"]) $(id).disabled = running;
  $("cancel").disabled = !running;
  $("download").disabled = running || $("picture").hidden;
  if (!held?.matches(":disabled")) return;
  if (running) focused = held;
  (running ? $("cancel") : (focused ?? $("sample"))).focus();
}

// Shows how far `task` is, and in the end what `say` makes of its result.
async function follow(task, say) {
  const started = performance.now();
  $("error").textContent = "";
  $("status").textContent = "Loading the network";
  $("progress").value = 0;
  setRunning(true);
  let first;
  try {
    const { steps } = (await unlessCancelled(opening)).about;
    const result = await task((step, partial) => {
      // The first step has waited for the network to load: it says nothing of the others.
      if (step === 0) first = performance.now();
      const left = (((performance.now() - first) / step) * (steps - 1 - step)) / 1000;
      const remaining = step === 0 ? "" : `, ${left.toFixed(left < 10 ? 1 : 0)} s left`;
      $("progress").value = (step + 1) / steps;
      $("status").textContent = `Step ${step + 1}/${steps}${remaining}`;
      if (partial) show(partial);
    });
    $("status").textContent = say(result, ((performance.now() - started) / 1000).toFixed(1));
  } catch (error) {
    const cancelled = error.message === CANCELLED;
    $("status").textContent = cancelled ? "Cancelled" : "";
    if (!cancelled) report(error);
  } finally {
    setRunning(false);
  }
}

const press = () =>
  follow(
    async (onStep) => sample(await unlessCancelled(options()), onStep),
    ({ picture, shape: [count] }, seconds) => {
      show(picture);
      return `${count} image${count > 1 ? "s" : ""} in ${seconds} s`;
    },
  );

const pressTest = () =>
  follow(selfTest, ({ passed, reason, deviation }, seconds) => {
    if (!passed) throw new Error(`self-test failed: ${reason}`);
    const most = Math.max(...deviation).toFixed(2);
    return `Self-test passed in ${seconds} s: at most ${most} of the quantization noise`;
  });

function download() {
  const link = document.createElement("a");
  link.href = $("picture").toDataURL("image/png");
  link.download = "samples.png";
  link.click();
}

// Buttons that put a label into the text field, or take it out again.
function addChips(names) {
  const field = $("label");
  const chosen = () => field.value.split(",").map((each) => each.trim()).filter(Boolean);
  const chips = names.map((name) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = name;
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
  $("chips").hidden = chips.length === 0;
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
  press();
};
// A key that is held down presses what has the focus again and again: Sample, then Cancel.
$("form").onkeydown = (event) => {
  if (event.repeat && event.key === "Enter") event.preventDefault();
};
$("test").onclick = pressTest;
$("cancel").onclick = cancel;
$("download").onclick = download;
window.addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  report(event.reason);
});
window.edgeqdm = { sample, selfTest, cancel };
try {
  describe((await opening).about);
  setRunning(false);
  if (query.get("auto") === "1") await press();
} catch (error) {
  report(error);
}
