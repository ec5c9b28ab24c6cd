"""Coding over finite fields: fixed point, secret sharing of long vectors, decoding from any sufficient shares."""
