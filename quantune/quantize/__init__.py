"""Post-training quantization: a checkpoint packed into a format that other libraries read."""
