def check_tap(layer, tap):
    """Raises ValueError unless `tap` is None or one of `layer.TAPS`, the names of what lies inside it."""
    if tap is not None and tap not in layer.TAPS:
        raise ValueError(f"{type(layer).__name__} {layer.name!r}: tap must be one of {layer.TAPS}, got {tap!r}.")
