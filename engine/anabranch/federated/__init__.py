"""Many clients that train one model: their data, their rounds, and those of them that are hostile."""
