"""Several processes: what the step asks of the others, sharded weights, one result of all ranks."""
