"""Latency profiles of devices: data files only, one folder per device, runtime and mode."""
