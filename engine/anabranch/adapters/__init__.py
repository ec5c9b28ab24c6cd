"""Low-rank adapters of a model's linear layers: to train, to save and to serve."""
