"""Pictures of workflows, as SVG, with what a running server says of their nodes."""
