"""Latencies measured on the target, and what they say of a plan."""
