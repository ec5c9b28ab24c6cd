"""Text on its way to a model: files, tokenizers, and streams of tokens cut into batches and windows."""
