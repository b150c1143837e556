"""All that serves a project, started, watched and stopped together."""
