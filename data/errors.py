"""The one exception this package raises for bad data or a bad data argument."""

from __future__ import annotations


class DataError(ValueError):
    """A data set, a sample or a data argument cannot be used; the message is one line that says why.

    Entry points turn it into exit status 2 without a traceback, like any other usage error.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a column's name may have several
