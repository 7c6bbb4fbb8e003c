"""A checkpoint that several files' tests read."""

from __future__ import annotations

import pytest

from tests.training.checkpoints import CHANGES, save
from tests.training.language_model import make_engine, make_model, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(an engine after two steps, its checkpoint); not to be changed."""
    directory = tmp_path_factory.mktemp("trained")
    engine = make_engine(make_model(directory / "model"), 4, **CHANGES)
    train(engine, range(2))
    return engine, save(engine, directory, 2)
