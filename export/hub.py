"""Writes a model as a TF-Hub module, for hub.load, hub.KerasLayer, HubLayer, TF Serving and LiteRT; `--archive` also packs it.

    python -m export.hub ViT_B16 --weights=augreg+imagenet2012 --out=modules/vit_b16_classification --archive

`keras_vit.hub.export` says what a module is and takes; it writes it in one step, checked by another process. Printed are its
size, the largest difference from the Keras model on real images, images per second of the module and of the Keras model's
compiled `predict`, and the digest to pin it by (`HubLayer(..., digest=)`). Needs the TensorFlow backend.

The archive is `OUT.tar.gz`, with the module's files at its root, as hosting in the manner of tfhub.dev and Kaggle Models take it;
the same files give the same bytes.
"""

import gzip
import sys
import tarfile
from pathlib import Path

import keras
import numpy as np

import keras_vit
from export import common
from keras_vit import errors
from keras_vit.checkpoints import fetch, files
from keras_vit.hub import graph, texts

TASKS = tuple(graph.TASKS)
LEVEL = 1  # of gzip: weights hardly shrink, whatever it tries


def reference(model, task):
    """The part of a Keras model that gives what its module for a task gives."""
    return keras.Model(model.inputs, graph.output(model, task, model.name))


def predicts(module, model, task, input_range="unit"):
    """(predict of the module's serving signature, predict of the Keras model), of images in [0, 1] -> numpy array.

    Args:
        module: what `tf.saved_model.load` returned.
        model: it was exported from; task, input_range: as it was exported.
    """
    import tensorflow as tf

    main, served = reference(model, task), module.signatures["serving_default"]

    def of_module(images):
        given = images if input_range == "unit" else images * np.float32(2.0) - np.float32(1.0)
        (output,) = served(images=tf.constant(given)).values()
        return output.numpy()

    def of_keras(images):
        ready = keras_vit.preprocess_input(images * np.float32(255.0), model)
        return keras.ops.convert_to_numpy(main.predict_on_batch(ready))

    return of_module, of_keras


def archive(folder, path):
    """Packs a module's folder into `path`, a .tar.gz that appears complete or not at all, and returns its sha256.

    Members are sorted, lie at the archive's root, and have neither time nor owner: the same files give the same bytes.

    Raises:
        errors.ExportError: a name begins with something other than a letter, digit or underscore, which hosts refuse.
    """
    folder = Path(folder)
    members = {each.relative_to(folder).as_posix(): each for each in folder.rglob("*")}
    strange = sorted(name for name in members if not all((part[0] == "_" or part[0].isalnum()) for part in name.split("/")))
    if strange:
        raise errors.ExportError(
            f"{path}: expected names that begin with a letter, digit or underscore, which hosts of modules take; {folder} has "
            f"{', '.join(strange)}. Move these away."
        )
    with files.replacing(path) as temporary:
        with (
            open(temporary, "wb") as raw,
            gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name, member in sorted(members.items()):
                info = tarfile.TarInfo(name)
                if member.is_dir():
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(info)
                    continue
                info.size = member.stat().st_size
                with open(member, "rb") as content:
                    tar.addfile(info, content)
        return fetch.sha256(temporary)


@common.command
def main(argv=None):
    parser = common.parser(__doc__, "model", "--weights", "--out", "--size", "--classes", "--json")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="what it gives (default: %(default)s)")
    parser.add_argument("--image-size", choices=("fixed", "any"), default="fixed", help="which images it takes")
    parser.add_argument("--dtype", help="'mixed_bfloat16' or 'mixed_float16' to compute in; default: the model's own")
    parser.add_argument("--input-range", choices=("unit", "minus1_1"), default="unit", help="[0, 1] or [-1, 1] (default: unit)")
    parser.add_argument("--archive", action="store_true", help="write OUT.tar.gz too")
    parser.add_argument("--publisher", help="who publishes it, for the model card")
    options = parser.parse_args(argv)
    common.need_tensorflow("export.hub")
    import tensorflow as tf

    model = common.build(options.model, options.weights, input_shape=common.shape_of(options.size), classes=options.classes)
    form = dict(task=options.task, input_range=options.input_range, dtype=options.dtype, image_size=options.image_size)
    card = {"publisher": options.publisher} if options.publisher else True
    path = Path(keras_vit.hub.export(model, options.out, card=card, **form))
    packed = None
    if options.archive:
        packed = path.with_name(f"{path.name}.tar.gz")
        archive(path, packed)
    if options.task in texts.TASKS:  # checked by `export` on texts; there are no images whose rate could be told
        common.report(
            path, model, task=options.task, digest=keras_vit.hub.digest(path), archive=packed and str(packed),
            archive_bytes=packed and packed.stat().st_size, as_json=options.json,
        )  # fmt: skip
        return 0
    model = common.image_model(model)
    module = tf.saved_model.load(str(path))
    of_module, of_keras = predicts(module, model, options.task, options.input_range)
    images = common.unit(common.real_images(common.BATCH, tuple(model.input_shape[1:3])))
    expected, got = of_keras(images), of_module(images)
    common.report(
        path, model, task=options.task, difference=float(np.max(np.abs(got - expected))),
        largest=float(np.max(np.abs(expected))), images_per_second=common.rate(of_module, images), batch=common.BATCH,
        keras_images_per_second=round(common.rate(of_keras, images), 1), digest=keras_vit.hub.digest(path),
        archive=packed and str(packed), archive_bytes=packed and packed.stat().st_size, as_json=options.json,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
