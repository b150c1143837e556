"""A request as TorchServe hands it to a handler."""

from __future__ import annotations

from torchserve_dag.runtime.compat.rows import Row
from torchserve_dag.runtime.data.media import FORM, form_fields, media_of
from torchserve_dag.runtime.data.parts import BODY
from torchserve_dag.runtime.worker.protocol import Part, ServiceRequest


def row_of(request: ServiceRequest) -> Row:
    """The row: the body as `body`, or a form's parts by their names; the request's headers, and each part's type.

    A body of which only the type says that it is a form is a body; TorchServe would drop it.
    """
    parts = request.parts
    if parts is None:
        fields = form_fields(request.body) if media_of(request.content_type) == FORM else None
        parts = [Part(*field) for field in fields] if fields else [Part(BODY, request.body, request.content_type)]
    about = {part.name: {"content-type": media_of(part.content_type)} for part in parts}
    return Row.received({part.name: part.content for part in parts}, about | dict(request.headers))
