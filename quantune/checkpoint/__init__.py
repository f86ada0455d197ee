"""Checkpoints that are whole or absent, and the folder of a run."""
