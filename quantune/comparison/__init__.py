"""Comparing formats on one model: what each one stores, loses and costs there."""
