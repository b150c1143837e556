"""Finds by measurement how one handler runs best on this machine."""
