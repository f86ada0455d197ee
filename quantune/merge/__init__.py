"""Base and adapter into one checkpoint."""
