"""An epoch of SGD on cross-entropy for many perceptrons at once, each on samples of its own."""
