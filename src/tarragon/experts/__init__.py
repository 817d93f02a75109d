"""The expert worker: resident expert weights, the layer-wise batcher, and the loop that serves rows (5.2)."""
