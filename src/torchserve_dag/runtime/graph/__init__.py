"""A workflow as a graph: its nodes, what they run, and their types, checked before anything runs.

How TorchServe's own workflow files, rows and archives work is known only to `torchserve/`. The modules here pass such
a file on to it (read.py), or name an archive that a node runs (finder.py).
"""
