"""Checkpoints tensor by tensor: reading one, and writing another like it, whatever their size."""
