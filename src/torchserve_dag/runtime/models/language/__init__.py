"""Language models: one interface, and an adapter to it for each engine."""
