"""A workflow as a graph: its nodes, what they run, and their types, checked before anything runs."""
