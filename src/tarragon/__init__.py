"""Tarragon: resilient serving of mixture-of-experts language models.

Attention workers and expert workers are separate processes and separate
failure domains; see ``docs/architecture.md`` for the map of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarragon.cluster import Cluster, ClusterError

__version__ = "0.1.0"
__all__ = ["Cluster", "ClusterError", "__version__"]


def __getattr__(name: str) -> Any:
    """Cluster and ClusterError, imported when they are first asked for: the package itself costs nothing."""
    if name in ("Cluster", "ClusterError"):
        from tarragon import cluster

        return getattr(cluster, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
