"""Requests run through a graph; knows nothing of TorchServe."""
