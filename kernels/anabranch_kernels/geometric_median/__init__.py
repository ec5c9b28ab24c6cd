"""Geometric median, and the two reads of N long rows that it and other robust rules consist of."""
