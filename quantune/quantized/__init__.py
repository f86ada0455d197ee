"""Layers over packed weights and the math of low-rank updates on them."""
