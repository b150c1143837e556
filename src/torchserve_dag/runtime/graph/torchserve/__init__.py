"""TorchServe's own workflow files and handlers as parts of a graph, and a graph as a `.war` for TorchServe's engine."""
