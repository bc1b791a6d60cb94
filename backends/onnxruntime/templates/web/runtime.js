// Opens a package over HTTP and runs its network with onnxruntime-web. Everything here works in a
// page and in a worker alike.

import * as playback from "./playback.js";
import { PlaybackError } from "./playback.js";
import { parseSeed } from "./philox.js";

const FORMAT = "edgeqdm-package";
const SCHEMA_VERSION = 1;
// The oldest that runs all kernels of these packages; 1.22 lacks those of 4-bit weights.
const ORT_VERSION = [1, 26];
const GRAPHS = ["model.onnx", "model.ort"];
const ORT_MODULE = "ort.wasm.min.mjs";
const ORT_FILES = [ORT_MODULE, "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];
const MAX_THREADS = 4;
// Threads whose files the server sends without the headers of isolation never start.
const ORT_START_MS = 120_000;
const COLUMNS = 10;

// The line that a user reads of any failure.
export function describe(error) {
  // What WebAssembly throws may be a bare number.
  const text = String(error?.message ?? error).split("\n")[0].slice(0, 300);
  const expected = error instanceof PlaybackError || error instanceof RangeError;
  return expected ? text : `internal: ${error?.name ?? "error"}: ${text}`;
}

// The version makes a file of another version another address: what a browser or a proxy has kept
// of a package that has been replaced is not taken for the new one.
async function read(base, name, version) {
  const url = new URL(`${name}?${version}`, base);
  let reason;
  try {
    const response = await fetch(url, { cache: "no-cache" });
    if (response.ok) return new Uint8Array(await response.arrayBuffer());
    reason = `HTTP ${response.status}`;
  } catch (error) {
    reason = error.message;
  }
  throw new PlaybackError(`${name} cannot be read: ${reason} - serve the whole package folder`);
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function parseJson(bytes, name) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return { text, value: JSON.parse(text) };
  } catch (error) {
    throw new PlaybackError(`${name} is not JSON: ${error.message}`);
  }
}

async function readManifest(base) {
  const { text, value } = parseJson(await read(base, "manifest.json", Date.now()), "manifest.json");
  if (value?.format !== FORMAT) throw new PlaybackError("manifest.json is not that of a package");
  if (value.schema_version !== SCHEMA_VERSION) {
    throw new PlaybackError(
      `manifest.json has schema_version ${JSON.stringify(value.schema_version)}, this page reads ` +
        `${SCHEMA_VERSION} - use the page that came with the package`,
    );
  }
  if (crypto.subtle) {
    const seal = String(value.manifest_sha256), parts = text.split(seal);
    const blank = new TextEncoder().encode(parts.join("0".repeat(64)));
    if (parts.length !== 2 || (await sha256(blank)) !== seal) {
      throw new PlaybackError("package is damaged: manifest.json (changed)");
    }
  }
  return value;
}

// A file of the package, held against the manifest. Browsers offer SHA-256 to secure addresses
// only (https, localhost); elsewhere the size alone is checked.
async function readChecked(base, manifest, name) {
  const listed = manifest.files?.[name];
  if (!listed) throw new PlaybackError(`package is damaged: ${name} (not in the manifest)`);
  const bytes = await read(base, name, listed.sha256);
  if (bytes.length !== listed.size) throw new PlaybackError(`package is damaged: ${name} (size)`);
  if (crypto.subtle && (await sha256(bytes)) !== listed.sha256) {
    throw new PlaybackError(`package is damaged: ${name} (changed)`);
  }
  return bytes;
}

async function openOrt(folder) {
  const missing = [];
  for (const name of ORT_FILES) {
    const found = await fetch(new URL(name, folder), { method: "HEAD" }).catch(() => null);
    if (!found || found.status === 404) missing.push(name);
  }
  if (missing.length) {
    throw new PlaybackError(
      `onnxruntime-web is missing: no ${missing.join(", ")} at ${folder} - npm install ` +
        "onnxruntime-web, then copy node_modules/onnxruntime-web/dist to runtime/web/ort, or " +
        "name another place with ?ort=URL",
    );
  }
  const ort = await import(new URL(ORT_MODULE, folder)).catch((error) => {
    throw new PlaybackError(`onnxruntime-web at ${folder} does not load: ${error.message}`);
  });
  const found = ort.env?.versions?.web ?? "of unknown version";
  const [major, minor] = found.split(".").map(Number), [wantMajor, wantMinor] = ORT_VERSION;
  if (!(major > wantMajor || (major === wantMajor && minor >= wantMinor))) {
    throw new PlaybackError(
      `onnxruntime-web ${found} is too old, ${ORT_VERSION.join(".")} or newer is needed`,
    );
  }
  ort.env.wasm.wasmPaths = folder.href;
  ort.env.wasm.initTimeout = ORT_START_MS;
  // Threads share memory, which browsers grant to cross-origin isolated pages only.
  const cores = navigator.hardwareConcurrency || 1;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(cores, MAX_THREADS) : 1;
  return ort;
}

async function openNetwork(ort, model) {
  const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(model, options).catch((error) => {
    const reason = describe(new PlaybackError(error?.message ?? error));
    throw new PlaybackError(`onnxruntime-web ${ort.env.versions.web} refuses the graph: ${reason}`);
  });
  return async (x, count, step, conditioning, shape) => {
    const values = [
      new ort.Tensor("float32", x, [count, ...shape]),
      new ort.Tensor("int64", BigInt64Array.of(BigInt(step)), []),
    ];
    if (conditioning) {
      const type = conditioning.data instanceof BigInt64Array ? "int64" : "float32";
      values.push(new ort.Tensor(type, conditioning.data, conditioning.shape));
    }
    const feeds = Object.fromEntries(session.inputNames.map((name, k) => [name, values[k]]));
    try {
      return (await session.run(feeds))[session.outputNames[0]].data;
    } catch (error) {
      const reason = describe(new PlaybackError(error?.message ?? error));
      throw new PlaybackError(
        `step ${step} fails: ${reason} - if memory ran out, draw fewer images at once`,
      );
    }
  };
}

// Opens the package at `base` (a URL); the network and onnxruntime-web (folder URL `ort`) are read
// the first time they are needed. Returns {about, sample, selfTest}.
export async function openPackage(base, ort) {
  const manifest = await readManifest(base);
  const checked = (name) => readChecked(base, manifest, name);
  const { value: schedule } = parseJson(await checked("schedule.json"), "schedule.json");
  const hasNull = "conditioning.safetensors" in manifest.files;
  const extra = hasNull ? await checked("conditioning.safetensors") : null;
  const player = playback.openPlayer(schedule, extra);
  const graph = GRAPHS.find((name) => name in manifest.files) ?? GRAPHS[0];
  const about = {
    name: manifest.model.name,
    sampler: schedule.program.sampler,
    steps: player.table.steps,
    bytes: manifest.files[graph]?.size,
    conditioning: player.conditioning,
    labelNames: player.labelNames,
    hashed: Boolean(crypto.subtle),
  };
  let network = null;

  async function opened() {
    network ??= await openNetwork(await openOrt(ort), await checked(graph));
    return (x, count, step, conditioning) =>
      network(x, count, step, conditioning, player.sampleShape);
  }

  // Options are texts as run.py takes them: seed, label, count; `embedding` holds the bytes of a
  // .npy file. onStep: async, is told (step, sheet of the sample after it). Returns {latents,
  // shape, picture}.
  async function sample({ seed = 0, embedding = null, ...wanted }, onStep) {
    const key = parseSeed(seed);
    const array = embedding && playback.readNpy(embedding, "the embedding");
    const chosen = playback.choose(player, { ...wanted, embedding: array });
    const picture = (samples) => playback.sheet(playback.decode(player, samples), COLUMNS);
    const seen = (step, samples) => onStep?.(step, picture(samples));
    const latents = await playback.sample(player, await opened(), chosen, key, seen);
    return { latents, shape: [chosen.count, ...player.sampleShape], picture: picture(latents) };
  }

  // Replays the golden run, see playback.js; onStep is told each step.
  async function selfTest(onStep) {
    const name = "golden.safetensors";
    const golden = playback.readSafetensors(await checked(name), name);
    return playback.selfTest(player, await opened(), golden, onStep);
  }
  return { about, sample, selfTest };
}
