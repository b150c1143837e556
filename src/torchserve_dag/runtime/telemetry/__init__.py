"""Metrics and spans of a workflow's nodes, and the scores of its answers."""
