"""Configurations of `python -m keras_vit.main`, with the original's names, keys and defaults."""
