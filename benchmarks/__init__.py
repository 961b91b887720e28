"""Measurements through the public API of keras_vit; each file is one command, `python -m benchmarks.NAME`."""
