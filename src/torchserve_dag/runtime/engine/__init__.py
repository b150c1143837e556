"""Requests run through a graph; nothing here knows TorchServe."""
