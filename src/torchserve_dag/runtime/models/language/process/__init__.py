"""An engine in a process of its own, so that its steps hold up no thread of the worker."""
