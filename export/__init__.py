"""Other forms of a model, through the public API of keras_vit; each file is one command, `python -m export.NAME`."""
