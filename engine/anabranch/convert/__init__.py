"""Checkpoints with as many K as V heads made into ones with fewer K heads: merging, measuring, healing."""
