"""Linear layers for few rows: what decoding on a CPU consists of."""
