"""Attention over a paged cache whose K and V have their own head counts, widths and dtypes."""
