"""Unedited archives of TorchServe's, as services of the direct host.

    loading.py   an unpacked archive, loaded as TorchServe's worker loads it
    settings.py  what its manifest and its model-config.yaml say
    service.py   the queue, the batches, the time limits, and the thread on which the model runs
    request.py   a request in the service, which is answered once
    handler.py   a batch through the handler: rows in, bodies, statuses and headers out

Such an archive carries no copy of this package, so all of this uses the installed `runtime/` beyond its protocol. A
process that serves an archive of ours must not import it: that archive brings a `runtime/` of its own.
"""

from torchserve_dag.direct.torchserve_archive.loading import load

__all__ = ["load"]
