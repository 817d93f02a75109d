"""Tarragon: resilient serving of mixture-of-experts language models.

Attention workers and expert workers are separate processes and separate
failure domains; see ``docs/architecture.md`` for the map of this package.
"""

__version__ = "0.1.0"
