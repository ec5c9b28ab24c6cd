"""Robust rules that work coordinate by coordinate: median, trimmed mean and means around them, in one read."""
