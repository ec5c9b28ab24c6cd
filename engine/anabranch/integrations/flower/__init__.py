"""Robust rules and secure sums in Flower (the extra `flower`)."""
