"""Checkpoints on disk: what shape a model has, where its experts' weights lie, and a model to try.

Nothing is imported here: whoever asks for a shape must not pay for torch.
"""
