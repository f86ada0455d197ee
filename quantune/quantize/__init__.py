"""Post-training quantization: a checkpoint packed into a format that other libraries read."""

REPORT = "quantize.json"
"""In a quantized folder: how it was quantized, and what came of it."""
