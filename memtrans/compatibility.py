"""Arguments that `memorizing-transformers-pytorch` has and that mean nothing here: accepted, told once, ignored."""

from __future__ import annotations

import warnings
from typing import Any

UNUSED: Any = object()  # the default of such an argument


def warn_unused(**arguments: Any) -> None:
    """One DeprecationWarning for the arguments that were given although they have no meaning any more."""
    given = [name for name, value in arguments.items() if value is not UNUSED]
    if given:
        warnings.warn(
            f"{', '.join(given)}: accepted for compatibility and ignored; the memory lives on the device in one tensor "
            "and is searched exactly, so there are no files, no processes and no probes to choose",
            DeprecationWarning,
            stacklevel=3,
        )
