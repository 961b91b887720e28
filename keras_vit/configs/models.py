"""`config.model`: the original's keys, made from the rows of the registry, and what a builder makes of them."""

import difflib
import inspect
import pathlib
import re

import ml_collections
from ml_collections.config_dict import placeholder

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import augreg

_TRANSFORMER = {
    "patches.size": "patch_size", "hidden_size": "width", "transformer.mlp_dim": "mlp", "transformer.num_heads": "heads",
    "transformer.num_layers": "depth", "transformer.attention_dropout_rate": "attention_dropout_rate",
    "transformer.dropout_rate": "dropout_rate", "classifier": "classifier", "representation_size": "representation_size",
}  # fmt: skip
# Key of the original -> argument of the family's builder
FIELDS = {
    "ViT": _TRANSFORMER,
    "Hybrid": {**_TRANSFORMER, "resnet.num_layers": "stages", "resnet.width_factor": "width_factor"},
    "Mixer": {
        "patches.size": "patch_size", "hidden_dim": "width", "num_blocks": "depth", "tokens_mlp_dim": "tokens_mlp",
        "channels_mlp_dim": "channels_mlp",
    },
}  # fmt: skip
# Arguments that the original's keys cannot say; `config.model` has those that a recipe sets, under their own names
MORE = {"ViT": ("positions", "style")}


def model_config(model_name, family="ViT", **given):
    """The original's ConfigDict of a model; `arguments` is the way back.

    Its `representation_size=None` means no such layer: what a checkpoint has of it is dropped.

    Args:
        model_name: that of its checkpoint, without ".npz".
        family: a key of `FIELDS`, or another family, whose configuration has `given` under the builder's own names.
        given: arguments of the family's builder; others have its defaults.
    """
    if family not in FIELDS:
        return ml_collections.ConfigDict(
            {"model_name": model_name, **{name: placeholder(int) if value is None else value for name, value in given.items()}}
        )
    values = {name: parameter.default for name, parameter in inspect.signature(getattr(keras_vit, family)).parameters.items()}
    values |= given
    patch = values["patch_size"]
    values["patch_size"] = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if values.get("representation_size") in (None, "auto"):
        values["representation_size"] = placeholder(int)
    if "width_factor" in values:
        values["width_factor"] = float(values["width_factor"])  # the type that --config.model.resnet.width_factor then takes
    nested = {"model_name": model_name, **{name: given[name] for name in MORE.get(family, ()) if name in given}}
    for key, argument in FIELDS[family].items():
        parent, _, leaf = key.rpartition(".")
        (nested.setdefault(parent, {}) if parent else nested)[leaf] = values[argument]
    return ml_collections.ConfigDict(nested)


def family(config):
    """The builder's name that a configuration means; as in the original, a model with `resnet` is a hybrid."""
    return "Hybrid" if config.model_type == "ViT" and "resnet" in config.model else config.model_type


def arguments(config):
    """The builder's keywords for a configuration's `model`, and its `stochastic_depth_rate`.

    Raises:
        errors.ConfigError: it lacks keys of its family, or has others.
    """
    name = family(config)
    if name not in FIELDS:
        return _own_arguments(config, name)
    found, fields = dict(_flattened(config.model)), FIELDS[name]
    found.pop("model_name", None)
    more = {key: found.pop(key) for key in MORE.get(family(config), ()) if key in found}
    if set(found) != set(fields):
        raise errors.ConfigError(
            f"config.model is none of a {family(config)} (config.model_type={config.model_type!r}): it lacks the keys "
            f"{sorted(set(fields) - set(found))} and has {sorted(set(found) - set(fields))}; start from vit.py:MODEL,DATASET."
        )
    more["stochastic_depth_rate"] = config.stochastic_depth_rate
    return {argument: found[key] for key, argument in fields.items()} | more


def _own_arguments(config, name):
    """As `arguments`, of a family that the original's keys do not know."""
    known = inspect.signature(getattr(keras_vit, name)).parameters
    found = {key: value for key, value in config.model.items() if key != "model_name"}
    if config.stochastic_depth_rate or "stochastic_depth_rate" in known:
        found["stochastic_depth_rate"] = config.stochastic_depth_rate
    if set(found) - set(known):
        raise errors.ConfigError(
            f"config.model: a {name} takes none of {sorted(set(found) - set(known))}; its arguments are {', '.join(known)}."
        )
    return found


def _flattened(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def use_row(config, row):
    """Sets what a configuration says of its model to a row of the registry, called as the original calls it."""
    config.model_type, given = "ViT" if row.family.name == "Hybrid" else row.family.name, dict(row.arguments)
    config.stochastic_depth_rate = given.pop("stochastic_depth_rate", config.stochastic_depth_rate)
    config.model = model_config(next(iter(row.upstream), row.name), row.family.name, **given)


def find_row(name, rows):
    """The row called `name` in {name: row}.

    Raises:
        errors.ConfigError: there is none; names the nearest.
    """
    if name in rows:
        return rows[name]
    same = {row.name: row for spelling, row in rows.items() if spelling.lower() == name.lower()}
    if len(same) == 1:
        return same.popitem()[1]
    near = difflib.get_close_matches(name, rows, 3) or rows
    raise errors.ConfigError(f"{name!r} is no model of this configuration; nearest: {', '.join(near)}.")


def rows():
    """{every name: row} of what the original's keys can say.

    Names are the original's keys ("b16", "r50_b16"), its file names ("ViT-B_16", "R50+ViT-B_16") and ours ("ViT_B16").
    """
    found = {}
    for row in zoo.VARIANTS.values():
        if row.family.name not in FIELDS or set(row.arguments) <= set(FIELDS[row.family.name].values()):
            for upstream in row.upstream:
                key = upstream.replace("ViT-", "").replace("+", "_").replace("-", "_").lower()
                found |= {re.sub(r"_(?=\d)", "", key): row, upstream: row}
            found[row.name] = row
    return found


def augreg_rows():
    """{the original's AugReg name ("B_16", "R50_L_32"): row} for the rows that have an AugReg checkpoint."""
    tuned = [row for row in rows().values() if "augreg" in row.weights]
    return {augreg.parse(pathlib.Path(row.weights["augreg"].source).name)["model"]: row for row in tuned}
