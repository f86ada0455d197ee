"""Merging: an adapter and its base become one checkpoint, and are shown to answer alike."""
