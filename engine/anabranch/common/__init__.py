"""What every part of the engine may use: files of checkpoints."""
