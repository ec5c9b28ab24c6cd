"""Low-rank adapters in which every rank is an expert that tokens choose; many adapters in one batch."""
