"""Secure, verifiable aggregation of long vectors: the server learns a weighted sum and proves it. SVAFD-style."""
