"""A step of the keeper, which may fail without ending the keeper."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torchserve_dag.clients import ServingError
from torchserve_dag.server.errors import ServerError

logger = logging.getLogger(__name__)


def attempt(step: Callable[[], None]) -> None:
    """Run a step. A step that fails is logged, and runs again in the next round."""
    try:
        step()
    except (ServerError, ServingError, OSError) as error:
        logger.warning("%s", error)
    except Exception:  # one failing step must not end the keeper
        logger.exception("a step of the keeper failed")
