"""Checkpoints in safetensors that others quantized: a file for each method."""
