"""How the memory's write rules behave in training: the studies behind docs/memory.md and docs/stability.md."""
