"""Pictures of workflows, as SVG and Mermaid, with live numbers of each node."""
