"""Builds and updates indexes of documents, for `torchserve-dag index`."""
