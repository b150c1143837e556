"""A request in, an answer out, for any host."""
