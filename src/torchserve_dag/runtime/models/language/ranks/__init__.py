"""A model over several processes: pipelines, and AutoTP."""
