"""Moving blocks between pools: what to copy (plan), by which means (shm), in which order (endpoint)."""
