"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from pool import Pool

from commopt import kernels

torch.set_num_threads(1)
hypothesis.settings.register_profile("commopt", deadline=None, max_examples=60)
hypothesis.settings.load_profile("commopt")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Five ranks with Gloo, started at the first use."""
    kernels.warm_up()
    ranks = Pool()
    yield ranks
    ranks.close()
