"""What every part of the engine may use: files of checkpoints, and what a training run needs around its model."""
