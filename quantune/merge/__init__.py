"""Base and adapter into one checkpoint, verified and compared."""
