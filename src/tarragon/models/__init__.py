"""Checkpoints on disk: what shape a model has, where its experts' weights lie, and a model to try."""

from tarragon.models.expert_weights import ExpertWeights
from tarragon.models.shape import ModelError, MoeModel, read_model

__all__ = ["ExpertWeights", "ModelError", "MoeModel", "read_model"]
