"""The benchmark: measures every system with the same workloads in turn, and reports the results."""
