"""Decode speed of real servers, stock and compressed, in one run."""
