"""TorchServe's workers: its socket (wire, rows), the loops of its two modes (batched; asynchronous with guard and
exchange), several workers that share one model (sharing, follower), and the nodes of a `.war` (segments).
"""
