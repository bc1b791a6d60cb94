"""Quantized layers: the custom ops, the modules that call them, and how they are made."""
