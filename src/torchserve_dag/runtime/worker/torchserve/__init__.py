"""TorchServe's workers: its socket (wire, rows), the loops of its two modes (batched; asynchronous with guard and
exchange), and the nodes of a `.war` (segments).
"""
