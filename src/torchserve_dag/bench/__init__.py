"""The public benchmark: every system on the same works and loads, interleaved, and a report."""
