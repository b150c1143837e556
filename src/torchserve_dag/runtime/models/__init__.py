"""Handlers, loaded; and models that are served elsewhere."""
