"""The features of a classifier at several scales, by rewiring it."""

import keras

from keras_vit import zoo
from keras_vit.errors import ArgumentError
from keras_vit.layers import GroupNorm

NORMS = (GroupNorm, keras.layers.LayerNormalization)


def pyramid(model, norms=True, levels=None):
    """A model of the same layers that gives {"P2": (b, h, w, c), "P3": ...}, Pn being 2**n times smaller than the image.

    Args:
        model: built by keras_vit, of a family whose features halve their size from stage to stage (PoolFormer, hybrids).
        norms: whether each level goes through a new norm over its image, `P2_norm` ..., as PoolFormer's authors train detectors
            (arXiv 2111.11418, section 4.2). Levels that end in a norm, as of pyramid=True, get no second one.
        levels: the n to give; None for all that the model has.

    Returns:
        A functional `keras.Model`. It shares its weights with `model`, so that training one trains the other.

    Raises:
        ArgumentError: the model has one scale only, is not of keras_vit, or lacks a level.
    """
    having = levels_of(model)
    lacking = set(levels or ()) - set(having)
    if lacking:
        raise ArgumentError(
            f"pyramid: {model.name!r} has the levels {list(having)}, not {sorted(lacking)}; ask for some of these."
        )
    outputs = {}
    for n in levels or having:
        name = having[n]
        features = zoo.tap(model, name)
        if norms and not isinstance(model.get_layer(name), NORMS):
            features = GroupNorm(1, 1e-5, name=f"P{n}_norm")(features)
        outputs[f"P{n}"] = features
    return keras.Model(model.inputs, outputs, name=f"{model.name}_pyramid")


def levels_of(model):
    """{n: name of the layer that gives the features at 1 / 2**n of the image's size}, of a model with a pyramid.

    Raises:
        ArgumentError: as `pyramid`.
    """
    family = zoo.FAMILIES.get(getattr(model, "family", None))
    levels = family.pyramid(model) if family else {}
    if not levels:
        having = ", ".join(name for name, other in zoo.FAMILIES.items() if other.pyramid is not zoo.Family.pyramid)
        raise ArgumentError(
            f"pyramid: expected a keras_vit model whose features have several scales (families {having}), got "
            f"{getattr(model, 'name', model)!r} of family {getattr(model, 'family', None)}; take keras_vit.PoolFormer_S12."
        )
    return levels
