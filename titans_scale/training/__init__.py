"""The main loop and what belongs to it: loss, optimizer, schedule, checkpoints, metrics, signals."""
