"""What nodes have done: metrics, spans, scores."""
