"""Bits per layer and per denoising step, searched against measured latencies."""
