"""The front door: Envoy in front of TorchServe. It shares traffic between versions, and may face a network."""
