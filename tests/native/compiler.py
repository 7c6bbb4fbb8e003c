"""Whether this machine can compile the C++ kernels."""

from __future__ import annotations

import pytest

from alignment.native.build import BuildError, load_library


def _why_not() -> str | None:
    try:
        load_library()
    except BuildError as error:
        return str(error)
    return None


reason = _why_not()
needs_compiler = pytest.mark.skipif(reason is not None, reason=f"C++ kernels: {reason}")
