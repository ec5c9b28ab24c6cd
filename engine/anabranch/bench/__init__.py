"""Measurements beside strong peers: same process, same data, alternating calls, a roof measured in the same minutes."""
