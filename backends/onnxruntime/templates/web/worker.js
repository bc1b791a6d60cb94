// Samples beside the page, so that it stays responsive; ending this worker cancels at once.
// In: {open: {base, ort}}, then any number of {sample: options} and {selfTest: true}.
// Out: {about}, {step, picture}, {done}, {error}.

import { describe, openPackage } from "./runtime.js";

let opened = null;

async function answer({ open, sample, selfTest }) {
  if (open) {
    opened = await openPackage(new URL(open.base), new URL(open.ort));
    return { about: opened.about };
  }
  if (selfTest) return { done: await opened.selfTest((step) => postMessage({ step })) };
  return { done: await opened.sample(sample, (step, picture) => postMessage({ step, picture })) };
}

self.onmessage = async ({ data }) => {
  try {
    postMessage(await answer(data));
  } catch (error) {
    postMessage({ error: describe(error) });
  }
};
