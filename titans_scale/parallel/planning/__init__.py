"""What a run will take on any number of GPUs, before there is one: memory, traffic, time."""
