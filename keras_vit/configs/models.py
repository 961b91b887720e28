"""`config.model`: the original's fields, made from the rows of the registry, and what a builder makes of them."""

import difflib
import inspect

import ml_collections
from ml_collections.config_dict import placeholder

from keras_vit import errors, zoo


def model_config(
    model_name, *, patch_size, width, depth, heads, mlp, attention_dropout_rate=0.0, dropout_rate=0.0, classifier="token",
    representation_size=None,
):  # fmt: skip
    """The original's ConfigDict of a ViT; `arguments` is the way back.

    Its `representation_size=None` means no such layer: what a checkpoint has of it is dropped.
    """
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    config = ml_collections.ConfigDict()
    config.model_name = model_name
    config.patches = ml_collections.ConfigDict({"size": patch})
    config.hidden_size = width
    config.transformer = ml_collections.ConfigDict()
    config.transformer.mlp_dim = mlp
    config.transformer.num_heads = heads
    config.transformer.num_layers = depth
    config.transformer.attention_dropout_rate = attention_dropout_rate
    config.transformer.dropout_rate = dropout_rate
    config.classifier = classifier
    config.representation_size = placeholder(int) if representation_size is None else representation_size
    return config


def arguments(config):
    """The keywords of `keras_vit.ViT` for a `config.model`."""
    transformer = config.transformer
    return dict(
        patch_size=tuple(config.patches.size),
        width=config.hidden_size,
        depth=transformer.num_layers,
        heads=transformer.num_heads,
        mlp=transformer.mlp_dim,
        attention_dropout_rate=transformer.attention_dropout_rate,
        dropout_rate=transformer.dropout_rate,
        classifier=config.classifier,
        representation_size=config.representation_size,
    )


def from_row(row):
    """The `config.model` of a row of the registry, called as the original calls it."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(row.build).parameters.items()}
    fields = list(inspect.signature(model_config).parameters)[1:]
    values = {name: defaults[name] for name in fields}
    if values["representation_size"] == "auto":
        values["representation_size"] = None
    return model_config(row.upstream[0] if row.upstream else row.name, **values)


def find_row(name, rows):
    """The row called `name` in {name: row}.

    Raises:
        errors.ConfigError: there is none; names the nearest.
    """
    if name in rows:
        return rows[name]
    near = difflib.get_close_matches(name, rows, 3) or rows
    raise errors.ConfigError(f"{name!r} is no model of this configuration; nearest: {', '.join(near)}.")


def vit_rows():
    """{every name: row}: the original's keys ("b16"), its file names ("ViT-B_16") and ours ("ViT_B16")."""
    rows = {}
    for row in zoo.VARIANTS.values():
        for upstream in row.upstream:
            key = upstream.removeprefix("ViT-").lower().replace("_", "", 1).replace("-", "_")
            rows |= {key: row, upstream: row}
        rows[row.name] = row
    return rows


def augreg_rows():
    """{the original's AugReg name ("B_16"): row} for the rows that have an AugReg checkpoint."""
    rows = [row for row in zoo.VARIANTS.values() if "augreg" in row.weights]
    return {row.upstream[0].replace("ViT-", "").replace("+", "_"): row for row in rows}
