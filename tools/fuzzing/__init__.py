"""What `tools/fuzz.py` tries: a module per target, each a list of numbered cases."""
