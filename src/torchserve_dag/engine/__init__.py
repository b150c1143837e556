"""The workflow engine: a checked graph of nodes, and the batches that flow through it.

It imports nothing of TorchServe.
"""
