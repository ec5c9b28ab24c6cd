"""Learning from labels of which some are wrong, on one machine or on many."""
