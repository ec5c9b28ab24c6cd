"""Small, resumable training of byte-level DiffQKV models."""
