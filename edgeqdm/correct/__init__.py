"""Correction of a sampler for the noise of a quantized network: measured, then applied."""
