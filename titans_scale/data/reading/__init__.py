"""From shards, wherever they lie, to batches: faults, order, mixture, stream."""
