"""From rows of files to tokens with targets, in an order that is a pure function of seed, epoch and index."""
