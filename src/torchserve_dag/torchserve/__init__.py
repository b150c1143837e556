"""What touches TorchServe itself: nothing else in the package knows that it is the server."""
