"""A plug-in for vLLM: attention with fewer K than V heads behind its back-end CUSTOM. Experimental: see plugin.py."""
