"""Measures how a handler runs fastest on this machine."""
