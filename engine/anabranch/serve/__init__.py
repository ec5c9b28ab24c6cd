"""Serving: requests in, tokens out, over paged and shared caches of K and V."""
