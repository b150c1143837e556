"""Indexes of documents: a reader that finds passages by meaning and by words. `torchserve-dag index` writes them."""
