"""Classifiers as functions of rows of numbers, for many clients in one computation."""
