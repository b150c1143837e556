"""A workflow as a graph: its nodes, what they run, and their types, checked before anything runs.

Only `torchserve/` knows TorchServe's own workflow files, rows and archives. The modules here pass such a file on to it
(read.py), or name an archive that a node runs (finder.py).
"""
