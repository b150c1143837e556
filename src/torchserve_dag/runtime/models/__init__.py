"""Loaded handlers, and models that another server serves."""
