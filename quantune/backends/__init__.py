"""Quantization backends: what they are (torch-free descriptions), where they come from, and how they pack weights."""
