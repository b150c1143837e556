"""`python -m torchserve_dag`: the same as the command `torchserve-dag`."""

from torchserve_dag.commands import app

app(prog_name="torchserve-dag")
