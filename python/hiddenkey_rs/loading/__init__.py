"""From tokens in Arrow to batches: the store, the sampler, the collator and the loader."""
