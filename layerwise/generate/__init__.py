"""Decoding: text from a stack, and how fast it comes."""
