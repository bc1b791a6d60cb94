// Runs a sampler that has been compiled to a table, bit for bit as runtime/python/solver.py, which
// says what it computes: coefficients rounded once to float32, every product and every sum rounded,
// terms in the same order, terms of weight 0 left out. A double holds the exact product of two
// float32 and enough of their sum, quotient or root that rounding it again changes nothing; only
// the exp of a learned variance is as exact as the library's.

const fround = Math.fround;
const SMALLEST_VARIANCE = fround(1e-20);

// Tensors are Float32Array: what `map` stores is rounded by that.
const scaled = (weight, x) => x.map((value) => weight * value);
const sum = (x, y) => x.map((value, k) => value + y[k]);

// The sampler of schedule.json, from its `program` and `correction`.
export function readTable(program, correction) {
  const steps = program.timesteps.length;
  const column = (name, values) => {
    const found = Float32Array.from(values);
    if (found.length !== steps || !found.every(Number.isFinite)) {
      throw new RangeError(`schedule.json: ${name} is not a column of ${steps} finite numbers`);
    }
    return found;
  };
  const rows = (name, values) => {
    const width = values[0].length, all = values.flat();
    const found = values.map((row) => Float32Array.from(row));
    const fits = found.length === steps && found.every((row) => row.length === width);
    if (!fits || width === 0 || !all.map(fround).every(Number.isFinite)) {
      throw new RangeError(`schedule.json: ${name} is not a table of ${steps} rows`);
    }
    return found;
  };
  const clip = program.clip && {
    limit: fround(program.clip.limit),
    sampleWeight: column("clip.sample_weight", program.clip.sample_weight),
    outputWeight: column("clip.output_weight", program.clip.output_weight),
    weight: column("clip.weight", program.clip.weight),
  };
  const learned = program.learned_variance && {
    logMin: program.learned_variance.log_min && column("log_min", program.learned_variance.log_min),
    logMax: program.learned_variance.log_max && column("log_max", program.learned_variance.log_max),
    absorbed: correction?.absorbed && rows("absorbed.variance", correction.absorbed.variance),
    largestShare: fround(correction?.absorbed?.largest_share ?? 0),
  };
  return {
    steps,
    initialSigma: fround(program.initial_sigma),
    inputScale: column("input_scale", program.input_scale),
    sampleWeights: rows("sample_weights", program.sample_weights),
    outputWeights: rows("output_weights", program.output_weights),
    // A row of one number stands for all channels.
    noiseStd: correction
      ? rows("noise_std", correction.noise_std)
      : rows("noise_std", program.noise_std.map((std) => [std])),
    clip: clip ?? null,
    correction: correction && {
      gain: column("gain", correction.gain),
      bias: rows("bias", correction.bias),
      inputWeight: correction.input_weight && column("input_weight", correction.input_weight),
    },
    learned: learned ?? null,
  };
}

export const addsNoise = (table, step) => table.noiseStd[step].some((std) => std !== 0);

// Number of the channel at each place of a tensor [B, C, H, W].
function channelOf(row, [, channels, height, width]) {
  if (row.length !== channels && row.length !== 1) {
    throw new RangeError(`schedule.json has ${row.length} channels, the sample ${channels}`);
  }
  return row.length === 1 ? () => 0 : (k) => Math.floor(k / (height * width)) % channels;
}

// Channels `from` to `to` of a tensor of `total` channels, `area` values each.
function channels(x, total, area, from, to) {
  const found = new Float32Array((x.length / total) * (to - from));
  for (let start = 0, at = 0; start < x.length; start += total * area) {
    const part = x.subarray(start + from * area, start + to * area);
    found.set(part, at);
    at += part.length;
  }
  return found;
}

function correct(table, step, output, fed, shape) {
  if (!table.correction) return output;
  const bias = table.correction.bias[step], channel = channelOf(bias, shape);
  const unbiased = output.map((f, k) => f - bias[channel(k)]);
  const corrected = scaled(table.correction.gain[step], unbiased);
  const weight = table.correction.inputWeight?.[step] ?? 0;
  return weight === 0 ? corrected : sum(corrected, scaled(weight, fed));
}

function learnedStd(learned, step, variance, shape) {
  const std = learned.logMin
    ? variance.map((v) => {
        const share = fround(0.5 * fround(v + 1));
        const upper = fround(share * learned.logMax[step]);
        const lower = fround(fround(1 - share) * learned.logMin[step]);
        return Math.exp(fround(0.5 * fround(upper + lower)));
      })
    : variance.map((v) => Math.sqrt(Math.max(v, SMALLEST_VARIANCE)));
  if (!learned.absorbed) return std;
  const absorbed = learned.absorbed[step], channel = channelOf(absorbed, shape);
  return std.map((s, k) => {
    const budget = Math.max(fround(s * s), SMALLEST_VARIANCE);
    const share = Math.min(fround(absorbed[channel(k)] / budget), learned.largestShare);
    const left = Math.max(fround(1 - share), fround(SMALLEST_VARIANCE / budget));
    return s * fround(Math.sqrt(left));
  });
}

function noiseTerm(table, step, noise, variance, shape) {
  const row = table.noiseStd[step], channel = channelOf(row, shape);
  if (!table.learned) return noise.map((z, k) => row[channel(k)] * z);
  const std = learnedStd(table.learned, step, variance, shape);
  return noise.map((z, k) => fround(row[channel(k)] * std[k]) * z);
}

function clipTerm(clip, step, sample, output) {
  const p = clip.sampleWeight[step], q = clip.outputWeight[step], { limit } = clip;
  return sample.map((x, k) => {
    const clean = fround(fround(p * x) + fround(q * output[k]));
    return clip.weight[step] * Math.min(Math.max(clean, -limit), limit);
  });
}

// x[i+1] from the samples and corrected outputs so far, newest first.
function advance(table, step, samples, outputs, noise, variance, shape) {
  const terms = [];
  for (const [name, weights, values] of [
    ["samples", table.sampleWeights[step], samples],
    ["outputs", table.outputWeights[step], outputs],
  ]) {
    weights.forEach((weight, age) => {
      if (weight === 0) return;
      if (age >= values.length) {
        throw new RangeError(`schedule.json: step ${step} needs ${name} ${age} steps back`);
      }
      terms.push(scaled(weight, values[age]));
    });
  }
  if (noise) terms.push(noiseTerm(table, step, noise, variance, shape));
  if (table.clip && table.clip.weight[step] !== 0) {
    terms.push(clipTerm(table.clip, step, samples[0], outputs[0]));
  }
  return terms.length ? terms.reduce(sum) : new Float32Array(samples[0].length);
}

// Draws samples, Float32Array of `shape` [B, C, H, W].
//   predict: async (scaled sample, step) -> network output, [B, 2C, H, W] with a learned variance
//   initial: unit-normal noise; noise: step -> z, asked once per step that adds noise
//   onStep: async, is told (step, x[i+1]) after each step
export async function run(table, predict, initial, noise, shape, onStep) {
  const [, depth, height, width] = shape, area = height * width;
  const samples = [], outputs = [];
  let sample = scaled(table.initialSigma, initial);
  for (let step = 0; step < table.steps; step++) {
    const fed = scaled(table.inputScale[step], sample);
    let output = await predict(fed, step), variance = null;
    const expected = sample.length * (table.learned ? 2 : 1);
    if (output.length !== expected) {
      throw new RangeError(`step ${step}: ${output.length} values, ${expected} are expected`);
    }
    if (table.learned) {
      variance = channels(output, 2 * depth, area, depth, 2 * depth);
      output = channels(output, 2 * depth, area, 0, depth);
    }
    samples.unshift(sample);
    outputs.unshift(correct(table, step, output, fed, shape));
    samples.length = Math.min(samples.length, table.sampleWeights[step].length);
    outputs.length = Math.min(outputs.length, table.outputWeights[step].length);
    const drawn = addsNoise(table, step) ? noise(step) : null;
    sample = advance(table, step, samples, outputs, drawn, variance, shape);
    await onStep?.(step, sample);
  }
  return sample;
}
