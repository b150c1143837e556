"""The front door: Envoy before TorchServe, which shares traffic between versions and may face a network."""
