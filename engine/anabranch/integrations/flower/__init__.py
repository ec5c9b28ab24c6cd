"""Robust rules as a strategy of Flower (the extra `flower`)."""
