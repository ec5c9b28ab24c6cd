"""Federations that are trees: neighbours of unlike models learn from each other's predictions."""
