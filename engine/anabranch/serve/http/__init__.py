"""HTTP as OpenAI's clients speak it, over the engine in its thread."""
