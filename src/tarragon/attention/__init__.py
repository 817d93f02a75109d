"""The attention worker: vLLM's engine core without expert weights (3.2)."""
