"""The parts of tools/benchmark.py: measuring, the competitors, and one module per kind of suite."""
