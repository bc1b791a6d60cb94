"""Diffusers models in, one uniform view out."""
