"""The processes that serve a project, started, watched and stopped together: TorchServe, the front door, the keeper."""
