# /// script
# dependencies = []
# [tool.bench]
# name = "torchserve-dag"
# arrangement = """\
# As the project's own files say: one process that uses every core, one lane a core, several of TorchServe's batches \
# at a time; batches of objects as the handlers' `run.batch` says (decisions 8 and 13 in docs/decisions)."""
# ///
"""This project: the workflow's archive, as `torchserve-dag build` and `up` serve it with TorchServe."""

import ours

if __name__ == "__main__":
    ours.main("torchserve")
