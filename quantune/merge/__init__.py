"""Base and adapter into one checkpoint, verified and compared."""

REPORT = "merge.json"
"""In a merged folder: what it was made of."""
