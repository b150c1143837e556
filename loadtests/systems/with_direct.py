# /// script
# dependencies = []
# [tool.bench]
# name = "torchserve-dag, direct"
# arrangement = """\
# The same archive on the direct host: Envoy hands each request to the one process, with one lane a core (decision 20 \
# in docs/decisions)."""
# ///
"""This project: the workflow's archive, as `torchserve-dag build` and `up --host direct` serve it."""

import ours

if __name__ == "__main__":
    ours.main("direct")
