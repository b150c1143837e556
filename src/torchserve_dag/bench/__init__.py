"""The benchmark: every system on the same works and loads in turn, and a report."""
