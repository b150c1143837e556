"""torchserve-dag: keep your TorchServe handlers and clients; get the workflow engine that it never had."""
