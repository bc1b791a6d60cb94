// Samples from a package: noise, guidance and pixels, as runtime/python/playback.py; labels and
// embeddings as runtime/python/run.py reads them. The network itself is a function
//   async (scaled sample, batch size, step, conditioning) -> Float32Array
// Conditioning is null or {data, shape}: BigInt64Array of labels, or Float32Array of embeddings.

import { INITIAL_STREAM, batchNormal, stepStream } from "./philox.js";
import { readTable, run } from "./solver.js";

// Of the self-test, as in runtime/python/playback.py, which gives the reasons.
export const GOLDEN_SHARE = 1.5;
export const SAMPLER_TOLERANCE = 1e-4;
const FLOAT_NOISE = 1e-5;
const GOLDEN_SEED = 0x5eed;
// All are one batch, which has to fit into the memory of WebAssembly, and then into a canvas.
const MOST_IMAGES = 1000;

// A package or an argument cannot be used; the message says which and why.
export class PlaybackError extends Error {}

const product = (sizes) => sizes.reduce((all, size) => all * size, 1);

// A package's schedule, ready to run, from schedule.json and conditioning.safetensors or null.
export function openPlayer(schedule, extra) {
  return {
    table: readTable(schedule.program, schedule.correction),
    guidance: schedule.guidance,
    conditioning: schedule.conditioning,
    decoder: schedule.decoder,
    sampleShape: schedule.sample_shape,
    labelNames: schedule.label_names,
    nullEmbedding: extra && readSafetensors(extra, "conditioning.safetensors").null.data,
    goldenNoiseRms: schedule.golden_noise_rms,
  };
}

const STORED = { F32: Float32Array, I64: BigInt64Array };

// The tensors of a small safetensors file, {name: {data, shape}}.
export function readSafetensors(bytes, name) {
  try {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const start = 8 + Number(view.getBigUint64(0, true));
    const text = new TextDecoder().decode(bytes.slice(8, start));
    const { __metadata__: _, ...header } = JSON.parse(text);
    const tensors = Object.entries(header).map(([key, { dtype, shape, data_offsets }]) => {
      if (!(dtype in STORED)) throw new TypeError(`${key} is ${dtype}`);
      const [from, to] = data_offsets.map((offset) => start + offset);
      return [key, { data: new STORED[dtype](bytes.slice(from, to).buffer), shape }];
    });
    return Object.fromEntries(tensors);
  } catch (error) {
    throw new PlaybackError(`${name} is not a readable safetensors file: ${error.message}`);
  }
}

const NPY_MAGIC = [0x93, ...Array.from("NUMPY", (letter) => letter.charCodeAt(0))];

// The array of a .npy file of floats, {data: Float32Array, shape}.
export function readNpy(bytes, name) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 12 || !NPY_MAGIC.every((byte, k) => bytes[k] === byte)) {
    throw new PlaybackError(`${name} is not a .npy file`);
  }
  const start = bytes[6] === 1 ? 10 : 12;
  const end = start + (bytes[6] === 1 ? view.getUint16(8, true) : view.getUint32(8, true));
  const header = new TextDecoder("latin1").decode(bytes.slice(start, end));
  const dtype = /'descr': *'([^']*)'/.exec(header)?.[1];
  const sizes = /'shape': *\(([\d, ]*)\)/.exec(header)?.[1];
  if (!["<f4", "<f8"].includes(dtype) || !/'fortran_order': *False/.test(header)) {
    throw new PlaybackError(
      `${name} holds ${dtype ?? "no array"}, the page reads float32 and float64 in C order`,
    );
  }
  const shape = sizes.split(",").map((size) => size.trim()).filter(Boolean).map(Number);
  const Stored = dtype === "<f4" ? Float32Array : Float64Array, body = bytes.slice(end);
  if (body.length !== product(shape) * Stored.BYTES_PER_ELEMENT) {
    throw new PlaybackError(`${name} is damaged: ${body.length} bytes for shape (${shape})`);
  }
  const data = Float32Array.from(new Stored(body.buffer));
  if (!data.every(Number.isFinite)) {
    throw new PlaybackError(`${name} holds NaN or a value beyond float32`);
  }
  return { data, shape };
}

// Number of images from a text; null where none is given.
function parseCount(text) {
  if (text === null || text === "") return null;
  const count = /^\s*\d+\s*$/.test(text) ? Number(text) : NaN;
  if (!(count >= 1 && count <= MOST_IMAGES)) {
    throw new PlaybackError(
      `the number of images must be a whole number in 1..${MOST_IMAGES}, got ${text}`,
    );
  }
  return count;
}

// What to draw, {count, conditioning}, from texts and an embedding {data, shape}; null is "not
// given".
export function choose(player, { label = null, count = null, embedding = null }) {
  const wanted = player.conditioning;
  if (embedding && wanted.kind !== "embedding") {
    throw new PlaybackError("this model takes no embedding");
  }
  if (label && wanted.kind !== "label") throw new PlaybackError("this model takes no label");
  if (wanted.kind === "embedding") return chooseEmbeddings(wanted, embedding);
  const given = parseCount(count);
  if (wanted.kind === "none") return { count: given ?? 1, conditioning: null };
  const labels = parseLabels(player, label, given);
  const data = BigInt64Array.from(labels, BigInt);
  return { count: labels.length, conditioning: { data, shape: [labels.length] } };
}

function chooseEmbeddings(wanted, embedding) {
  if (!embedding) throw new PlaybackError("choose a .npy file with one embedding per image");
  const [count, ...shape] = embedding.shape;
  if (!count || shape.join() !== wanted.shape.join()) {
    throw new PlaybackError(
      `embeddings must be (images, ${wanted.shape.join(", ")}), ` +
        `got (${embedding.shape.join(", ")})`,
    );
  }
  return { count, conditioning: embedding };
}

// Labels by number or name, comma between them; all labels once where none is asked for.
function parseLabels(player, text, count) {
  const { n_labels: total } = player.conditioning;
  if (!text?.trim()) return Array.from({ length: count ?? total }, (_, k) => k % total);
  const names = player.labelNames.map((name) => name.toLowerCase());
  const labels = text.split(",").map((each) => {
    // The last of equal names, as in a Python dictionary.
    const found = names.lastIndexOf(each.trim().toLowerCase());
    return found >= 0 ? found : /^\s*[-+]?\d+\s*$/.test(each) ? Number(each) : NaN;
  });
  if (labels.some(Number.isNaN)) {
    const known = player.labelNames.join(", ") || `0..${total - 1}`;
    throw new PlaybackError(`unknown label in "${text}"; known: ${known}`);
  }
  const outside = labels.find((label) => label < 0 || label >= total);
  if (outside !== undefined) {
    throw new PlaybackError(`label ${outside} is out of range 0..${total - 1}`);
  }
  if (labels.length > 1 && count !== null && count !== labels.length) {
    throw new PlaybackError(`${count} images contradict ${labels.length} labels`);
  }
  return labels.length > 1 ? labels : Array(count ?? 1).fill(labels[0]);
}

// Conditioning of one sample that stands for "none", or null where there is no such.
function nullConditioning(player) {
  if (player.conditioning.kind !== "label") return player.nullEmbedding;
  const label = player.conditioning.null_label;
  return label === null ? null : BigInt64Array.of(BigInt(label));
}

// Network output after classifier-free guidance, in one evaluation of twice the batch. A learned
// variance is no score to be extrapolated: it is that of the conditional half.
async function guided(player, evaluate, x, count, step, conditioning) {
  const none = conditioning && nullConditioning(player);
  if (player.guidance === 1 || !none) return evaluate(x, count, step, conditioning);
  const { data, shape } = conditioning;
  const both = new data.constructor(2 * data.length);
  for (let k = 0; k < count; k++) both.set(none, k * none.length);
  both.set(data, data.length);
  const twice = new Float32Array(2 * x.length);
  twice.set(x);
  twice.set(x, x.length);
  const doubled = { data: both, shape: [2 * count, ...shape.slice(1)] };
  const f = await evaluate(twice, 2 * count, step, doubled);
  const fNull = f.subarray(0, f.length / 2), fCond = f.subarray(f.length / 2);
  const size = product(player.sampleShape), outputSize = fCond.length / count;
  const guidance = Math.fround(player.guidance);
  return fNull.map((value, k) => {
    if (k % outputSize >= size) return fCond[k];
    return value + Math.fround(guidance * Math.fround(fCond[k] - value));
  });
}

// Draws samples, Float32Array [count, C, H, W]; image k depends on (seed, k) only.
export async function sample(player, evaluate, { count, conditioning }, seed, onStep) {
  const shape = [count, ...player.sampleShape], size = product(player.sampleShape);
  const predict = async (x, step) => {
    const f = await guided(player, evaluate, x, count, step, conditioning);
    if (!f.every(Number.isFinite)) {
      throw new PlaybackError(`step ${step}: the network's output holds NaN or Inf`);
    }
    return f;
  };
  const noise = (step) => batchNormal(seed, stepStream(step), count, size);
  const initial = batchNormal(seed, INITIAL_STREAM, count, size);
  return run(player.table, predict, initial, noise, shape, onStep);
}

// Replays the golden run: the network step by step on golden inputs, then the sampler on golden
// outputs. `golden` is that of golden.safetensors; onStep: async, is told each step. Returns
// {passed, reason: what is wrong or null, deviation [S] as a share of the quantization noise,
// sampler}.
export async function selfTest(player, evaluate, golden, onStep) {
  const { inputs, outputs, samples, initial, conditioning = null } = golden;
  const { steps } = player.table, [count] = initial.shape, size = product(player.sampleShape);
  const at = ({ data }, step) => {
    const each = data.length / steps;
    return data.subarray(step * each, (step + 1) * each);
  };
  const rms = (x) => Math.sqrt(x.reduce((all, value) => all + value * value, 0) / x.length);
  const deviation = [];
  for (let step = 0; step < steps; step++) {
    const f = await guided(player, evaluate, at(inputs, step), count, step, conditioning);
    const expected = Float64Array.from(at(outputs, step));
    const floor = Math.max(FLOAT_NOISE * rms(expected), 1e-30);
    const error = rms(expected.map((value, k) => f[k] - value));
    deviation.push(error / Math.max(player.goldenNoiseRms[step], floor));
    await onStep?.(step);
  }
  const largest = (x) => x.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const normal = (stream) => batchNormal(GOLDEN_SEED, stream, count, size);
  const drawn = normal(INITIAL_STREAM);
  let off = largest(drawn.map((value, k) => value - initial.data[k]));
  await run(
    player.table,
    async (_, step) => at(outputs, step),
    drawn,
    (step) => normal(stepStream(step)),
    initial.shape,
    (step, x) => {
      const expected = at(samples, step);
      off = Math.max(off, largest(x.map((value, k) => value - expected[k])));
    },
  );
  const sampler = off / Math.max(1, largest(samples.data));
  // A comparison with NaN is false.
  const wrong = [
    deviation.every((share) => share <= GOLDEN_SHARE) ? [] : ["the network's outputs"],
    sampler <= SAMPLER_TOLERANCE ? [] : ["the sampler's steps"],
  ].flat();
  const reason = wrong.length ? `${wrong.join(" and ")} differ from the golden run` : null;
  return { passed: reason === null, reason, deviation, sampler };
}

// Half to even, of a value that is not negative.
function rint(value) {
  const floor = Math.floor(value), rest = value - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

// Pixels {data: Uint8Array [B, H, W, channels], shape} of final samples in [-1, 1].
export function decode(player, samples) {
  const factor = player.decoder.kind === "pixel_shuffle" ? player.decoder.factor : 1;
  const [depth, height, width] = player.sampleShape;
  const count = samples.length / (depth * height * width);
  const shape = [count, height * factor, width * factor, depth / factor ** 2];
  const data = new Uint8Array(samples.length);
  let at = 0;
  for (let b = 0; b < shape[0]; b++) {
    for (let y = 0; y < shape[1]; y++) {
      for (let x = 0; x < shape[2]; x++) {
        for (let c = 0; c < shape[3]; c++) {
          const stored = (c * factor + (y % factor)) * factor + (x % factor);
          const row = (b * depth + stored) * height + Math.floor(y / factor);
          const value = samples[row * width + Math.floor(x / factor)];
          const level = Math.fround(Math.min(Math.max(value, -1), 1) + 1);
          data[at++] = rint(Math.fround(level * 127.5));
        }
      }
    }
  }
  return { data, shape };
}

// Images side by side, `columns` to a row, 1 pixel apart: {data: RGBA, width, height}. One channel
// is grey, three are RGB, of any other number the first is shown as grey.
export function sheet({ data, shape: [count, height, width, depth] }, columns) {
  const across = Math.max(1, Math.min(columns, count));
  const sheetWidth = across * (width + 1) - 1;
  const sheetHeight = Math.ceil(count / across) * (height + 1) - 1;
  const rgba = new Uint8ClampedArray(sheetWidth * sheetHeight * 4).fill(128);
  for (let at = 3; at < rgba.length; at += 4) rgba[at] = 255;
  const [green, blue] = depth === 3 ? [1, 2] : [0, 0];
  for (let k = 0; k < count; k++) {
    const top = Math.floor(k / across) * (height + 1), left = (k % across) * (width + 1);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const from = ((k * height + y) * width + x) * depth;
        const to = ((top + y) * sheetWidth + left + x) * 4;
        rgba[to] = data[from];
        rgba[to + 1] = data[from + green];
        rgba[to + 2] = data[from + blue];
      }
    }
  }
  return { data: rgba, width: sheetWidth, height: sheetHeight };
}
