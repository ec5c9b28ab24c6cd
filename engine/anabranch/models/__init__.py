"""Decoder-only models: their configuration, one definition of the block, and their checkpoints."""
