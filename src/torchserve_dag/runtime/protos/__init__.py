"""TorchServe 0.12.0's own gRPC interface: its two .proto files, and the code that `scripts/stubs` makes of them."""
