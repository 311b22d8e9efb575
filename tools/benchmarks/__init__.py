"""The parts of tools/benchmark.py: measuring, the baselines, and one module per kind of suite."""
