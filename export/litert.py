"""Writes a model as a LiteRT (TensorFlow Lite) file: float32 images (batch, H, W, 3) in [0, 1] to "logits" or "feature_vector".

    python -m export.litert ViT_B16 --weights=augreg+imagenet2012 --out=ViT_B16.tflite
    python -m export.litert runs/digits/model.keras --out=digits.tflite --quantize=int8 --representative=digits --dataset=digits

--quantize says how weights and arithmetic are stored and done; input and output are float32 in each:

    none      float32; a file that differs from the Keras model by more than 1e-5 is not written
    float16   weights halved, arithmetic in float32
    dynamic   weights of the matrix products in int8, activations quantised as they come
    int8      weights and activations in int8, by ranges seen on the training split of --representative; one image at a time

The checkpoint's preprocessing is inside, the batch is open (but for int8), and only LiteRT's builtin operators are used. The file
is run on real images before it gets its name, by ai-edge-litert if that is installed (`pip install -e '.[export]'`), else by
tf.lite. Needs the TensorFlow backend.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from export import common
from keras_vit import errors

QUANTIZED = ("none", "float16", "dynamic", "int8")
REPRESENTATIVE = 128  # images on which int8 sees its ranges


def convert(model, path, *, quantize="none", representative=None):
    """Writes a Keras model as a `.tflite` file.

    Args:
        model: with one image input of fixed size.
        path: the `.tflite` file; replaced in one step.
        quantize: one of `QUANTIZED`.
        representative: iterable of batches of images, float32 in [0, 1], for int8.

    Returns:
        (largest difference from the Keras model on real images, its largest output).

    Raises:
        errors.ExportError: it cannot be converted, or the float32 file does not give the model's outputs; `path` is as it was.
    """
    common.need_tensorflow("export.litert")
    if quantize not in QUANTIZED:
        raise errors.ArgumentError(f"export.litert: expected quantize in {QUANTIZED}, got {quantize!r}.")
    if (quantize == "int8") != (representative is not None):
        raise errors.ArgumentError(
            f"export.litert: quantize='int8' takes its ranges from representative images and the others take none, got "
            f"quantize={quantize!r} {'without' if representative is None else 'with'} them; see --representative."
        )
    function = common.served(model, batch=1 if quantize == "int8" else None)
    with common.writing(path, ".tflite") as temporary:
        Path(temporary).write_bytes(_converted(function, model, quantize, representative))
        tolerance = common.TOLERANCE if quantize == "none" else np.inf
        return common.checked(open_file(temporary), model, f"export.litert of {model.name!r} to {path}", tolerance)


def open_file(path):
    """The `predict` of a LiteRT file: float32 images in [0, 1] -> numpy array; one by one where its batch is fixed to 1."""
    if importlib.util.find_spec("ai_edge_litert"):
        from ai_edge_litert.interpreter import Interpreter
    else:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter
    interpreter = Interpreter(os.fspath(path), num_threads=os.cpu_count())
    run = interpreter.get_signature_runner("serving_default")
    ((given, spec),) = run.get_input_details().items()
    (taken,) = run.get_output_details()

    def predict(images):
        images = np.asarray(images, np.float32)
        parts = [images] if spec["shape_signature"][0] == -1 else np.split(images, len(images))
        return np.concatenate([run(**{given: part})[taken] for part in parts])

    return predict


def operators(content):
    """The set of names of the operators in the bytes of a `.tflite` file; one that is not builtin is "CUSTOM: ..."."""
    from tensorflow.lite.python import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    made = schema.ModelT.InitFromPackedBuf(content, 0)
    codes = [made.operatorCodes[operator.opcodeIndex] for graph in made.subgraphs for operator in graph.operators]
    return {f"CUSTOM: {code.customCode.decode()}" if code.customCode else names[code.builtinCode] for code in codes}


def _converted(function, model, quantize, representative):
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        root = tf.__internal__.tracking.AutoTrackable()
        root.kept = [v.value for v in model.variables]
        tf.saved_model.save(root, folder, signatures={"serving_default": function})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
        if quantize != "none":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if quantize == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if quantize == "int8":
            converter.representative_dataset = lambda: _one_by_one(representative)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        try:
            content = converter.convert()
        except Exception as error:  # the converter's own classes are not public
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise errors.ExportError(
                f"export.litert of {model.name!r}: expected TensorFlow to convert it with quantize={quantize!r}, got: {last[0]} "
                "Nothing was written."
            ) from error
    foreign = sorted(name for name in operators(content) if name.startswith("CUSTOM"))
    if foreign:
        raise errors.ExportError(
            f"export.litert of {model.name!r}: expected builtin operators only, got {foreign}; replace the layers that use them. "
            "Nothing was written."
        )
    return content


def _one_by_one(batches):
    for images in batches:
        for image in images:
            yield {"images": image[None]}


@common.command
def main(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--quantize", choices=QUANTIZED, default="none", help="(default: %(default)s)")
    parser.add_argument("--representative", metavar="DATASET", help="of its split 'train' int8 sees images; as --dataset")
    options = parser.parse_args(argv)
    common.need_tensorflow("export.litert")
    model = common.build(options.model, options.weights, input_shape=common.shape_of(options.size), classes=options.classes)
    model = common.image_model(model)
    seen = None
    if options.representative is not None:
        seen = [images for images, _ in common.batches(model, options.representative, "train", count=REPRESENTATIVE)]
    difference, largest = convert(model, options.out, quantize=options.quantize, representative=seen)
    predict = open_file(options.out)
    common.report(
        options.out, model, weights=options.weights, quantize=options.quantize, difference=difference, largest=largest,
        **common.speed(predict, model, 1 if options.quantize == "int8" else common.BATCH),
        top1=common.accuracies(predict, model, options.dataset, options.split), as_json=options.json,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
