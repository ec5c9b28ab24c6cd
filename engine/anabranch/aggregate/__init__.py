"""Robust aggregation: many clients' vectors to one, whatever a minority of them sends."""
