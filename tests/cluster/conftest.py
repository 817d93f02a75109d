"""One small cluster that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.workload import SMALL_LAYERS

from tarragon.cluster import Cluster
from tarragon.models.demo import ensure_demo_model


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """2 + 2 workers with the first layers of the demo model."""
    with Cluster(
        ensure_demo_model(layers=SMALL_LAYERS),
        2,
        2,
        engine_args=(
            "--max-model-len=1024",
            "--max-num-batched-tokens=256",
            # Four layers of a model like white space better than words.
            '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
        ),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def model_name() -> str:
    return ensure_demo_model(layers=SMALL_LAYERS).name
