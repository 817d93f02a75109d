"""REFE, the reconfigurable forwarding engine: what an attention worker does to reach experts (4.2, 5.1)."""
