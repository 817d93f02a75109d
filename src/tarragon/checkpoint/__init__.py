"""Checkpoints of KV caches: buckets, the records that commit them, their store, and restoring (section 6)."""
