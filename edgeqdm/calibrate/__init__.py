"""What the float model does along its own denoising trajectories."""
