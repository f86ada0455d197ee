"""quantune: LoRA fine-tuning on a quantized, frozen base, from one declarative recipe."""

__version__ = "0.1.0"
