"""Low-rank adapters beside the linear layers of a model, in memory and on disk."""
