"""Transformers' own continuous batching, and its `generate`."""
