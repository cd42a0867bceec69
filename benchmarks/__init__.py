"""Speed and memory beside a reference, in one run. Start with `python -m benchmarks.spine`."""
