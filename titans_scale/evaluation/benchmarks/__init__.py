"""Speed and memory of our code beside other people's, on a CPU: what tools/bench_memory.py and tools/bench_model.py run."""
