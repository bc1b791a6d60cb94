// Counter-based normal noise, value for value that of runtime/python/philox.py, which says how it
// is made: Philox4x32-10, then Box-Muller in doubles, rounded to float32 at the end.

export const INITIAL_STREAM = 0;

const MASK = 0xffffffffn;

// The stream of the noise that step `step` adds.
export const stepStream = (step) => 1 + step;

// The seed as an integer in 0..2**64 - 1, from a number, a BigInt or decimal digits.
export function parseSeed(seed) {
  const text = String(seed).trim();
  const value = /^\d{1,20}$/.test(text) ? BigInt(text) : -1n;
  if (value < 0n || value >= 1n << 64n) {
    throw new RangeError(`seed must be an integer in 0..2**64 - 1, but it is "${text}"`);
  }
  return value;
}

// High word of a 32x32-bit product. A double holds 53 bits, so the product is put together from
// 16-bit halves; no partial sum reaches 2**32.
function highWord(a, b) {
  const aLow = a & 0xffff, aHigh = a >>> 16, bLow = b & 0xffff, bHigh = b >>> 16;
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const cross = aLow * bHigh + (middle & 0xffff);
  return aHigh * bHigh + (middle >>> 16) + (cross >>> 16);
}

// Ten rounds over the four words of `words`, in place.
export function philox4x32(words, keyLow, keyHigh) {
  let [w0, w1, w2, w3] = words;
  for (let round = 0; round < 10; round++) {
    const leftHigh = highWord(w0, 0xd2511f53), leftLow = Math.imul(w0, 0xd2511f53);
    const rightHigh = highWord(w2, 0xcd9e8d57), rightLow = Math.imul(w2, 0xcd9e8d57);
    w0 = rightHigh ^ w1 ^ keyLow;
    w1 = rightLow;
    w2 = leftHigh ^ w3 ^ keyHigh;
    w3 = leftLow;
    keyLow = (keyLow + 0x9e3779b9) | 0;
    keyHigh = (keyHigh + 0xbb67ae85) | 0;
  }
  words[0] = w0;
  words[1] = w1;
  words[2] = w2;
  words[3] = w3;
}

// Unit-normal noise of images 0 to count - 1, `size` values each: Float32Array [count * size].
export function batchNormal(seed, stream, count, size) {
  const key = parseSeed(seed);
  const keyLow = Number(key & MASK) | 0, keyHigh = Number(key >> 32n) | 0;
  const found = new Float32Array(count * size);
  const words = new Uint32Array(4), values = new Float64Array(4);
  for (let image = 0; image < count; image++) {
    for (let start = 0; start < size; start += 4) {
      words.set([start / 4, 0, stream, image]);
      philox4x32(words, keyLow, keyHigh);
      for (let pair = 0; pair < 4; pair += 2) {
        const radius = Math.sqrt(-2 * Math.log((words[pair] + 1) / 2 ** 32));
        const angle = 2 * Math.PI * (words[pair + 1] / 2 ** 32);
        values[pair] = radius * Math.cos(angle);
        values[pair + 1] = radius * Math.sin(angle);
      }
      const end = Math.min(4, size - start);
      for (let k = 0; k < end; k++) found[image * size + start + k] = values[k];
    }
  }
  return found;
}
