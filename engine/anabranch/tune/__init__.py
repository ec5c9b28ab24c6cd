"""Adapters trained on examples, and experiments that show what each method is worth."""
