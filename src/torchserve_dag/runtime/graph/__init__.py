"""A workflow as a graph: read, found, typed and checked before anything runs."""
