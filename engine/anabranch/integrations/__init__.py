"""This package's attention inside other people's stacks: transformers, vLLM."""
