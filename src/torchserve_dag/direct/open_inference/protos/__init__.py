"""The Open Inference Protocol's own .proto file, and the code that `scripts/stubs` makes of it."""
