"""Measures with which settings a handler runs fastest on this machine."""
