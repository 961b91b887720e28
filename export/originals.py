"""Writes a model back as a file of its authors' layout, loads that into a fresh model and compares every weight, bit for bit.

    python -m export.originals ViT_B16 --weights=augreg --out=B_16.npz [--layout=linen]
    python -m export.originals runs/flowers/model.keras --out=flowers.npz
    python -m export.originals runs/flowers/model.keras --out=flowers.safetensors

--layout is one of the family's spellings, by default the one that the weights were read from; a file read in a narrower type is
written in it again where it holds the values. The ending names the format: .npz, .safetensors, or PyTorch's .pth and its like.
"""

import sys

import numpy as np

import keras_vit
from export import common
from keras_vit import errors
from keras_vit.checkpoints import files, load


def write(model, path, *, layout=None):
    """Writes a model's weights in an original layout, if a fresh model that loads them has the same bits.

    Args:
        model: built by keras_vit.
        path: the file, of one of `checkpoints.files.ENDINGS`; replaced in one step.
        layout: of the family; see `keras_vit.save_npz`.

    Returns:
        The fresh model.

    Raises:
        errors.ArgumentError: no such layout, or another ending. errors.ExportError: a weight comes back with other bits; `path`
            is as it was.
    """
    ending = files.ending(path)
    if ending is None:
        raise errors.ArgumentError(
            f"--out={path}: expected a file that ends in {', '.join(files.ENDINGS)}, the formats that checkpoints have. Name it "
            f"{path}.npz."
        )
    fresh = type(model).from_config(model.get_config())
    with common.writing(path, ending) as temporary:
        keras_vit.save_npz(model, temporary, layout)
        keras_vit.load_weights(fresh, temporary)
        pairs = zip(model.weights, fresh.weights, strict=True)
        other = [old.path for old, new in pairs if not np.array_equal(_bits(old), _bits(new))]
        if other:
            raise errors.ExportError(
                f"export.originals of {model.name!r} to {path}: expected every weight to come back with its bits, got others in "
                f"{other[:5]} ({len(other)} of {len(model.weights)}). Nothing was written; please report it."
            )
    return fresh


def _bits(variable):
    return np.ascontiguousarray(load.to_numpy(variable)).view(np.uint8)


@common.command
def main(argv=None):
    parser = common.parser(__doc__, "model", "--weights", "--out", "--size", "--classes", "--json")
    parser.add_argument("--layout", help="see `keras-vit inspect MODEL:TAG` for that of a file")
    options = parser.parse_args(argv)
    model = common.build(options.model, options.weights, input_shape=common.shape_of(options.size), classes=options.classes)
    fresh = write(model, options.out, layout=options.layout)
    predict, model = common.keras_predict(common.image_model(fresh)), common.image_model(model)
    difference, largest = common.difference(predict, model)
    common.report(
        options.out, model, weights=options.weights, layout=fresh.weights_info["layout"],
        adapted=model.weights_info["adapted"] or None, same_bits=True, difference=difference, largest=largest,
        **common.speed(predict, model), as_json=options.json,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
