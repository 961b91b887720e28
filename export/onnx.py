"""Writes a model as an ONNX file: input "images", float32 (batch, H, W, 3) in [0, 1], output "logits" or "feature_vector".

    python -m export.onnx ViT_B16 --weights=augreg+imagenet2012 --out=ViT_B16.onnx [--opset=18] [--dataset=digits]

The checkpoint's preprocessing is inside, the batch is open, all is float32. The file is checked by `onnx.checker` and run by ONNX
Runtime on real images before it gets its name; one that differs from the Keras model by more than 1e-5 is not written. Needs
`pip install -e '.[export]'` and the TensorFlow backend.
"""

import importlib
import os
import sys
from pathlib import Path

import keras
import numpy as np

from export import common
from keras_vit import errors

OPSET = 18  # the latest that tf2onnx writes
OLDEST = 13  # the first whose softmax and products of tensors mean what TensorFlow's do


def convert(model, path, *, opset=OPSET):
    """Writes a Keras model as an ONNX file, if it reproduces the model.

    Args:
        model: with one image input of fixed size.
        path: the `.onnx` file; replaced in one step.
        opset: version of the operators, 13 to 18.

    Returns:
        (largest difference from the Keras model on real images, its largest output).

    Raises:
        errors.ExportError: it cannot be converted, or the file does not give the model's outputs; `path` is as it was.
    """
    common.need_tensorflow("export.onnx")
    where = f"export.onnx of {model.name!r} to {path}"
    return convert_function(common.served(model), model, path, lambda predict: common.checked(predict, model, where), opset=opset)


def convert_function(served, model, path, check, *, opset=OPSET, halves=(), weights=None):
    """Writes a `tf.function` as an ONNX file, if that passes a check.

    Args:
        served: of one input, whose `input_signature` names it, -> {name of an output: tensor}.
        model: the Keras model whose weights it computes with.
        path: the `.onnx` file; replaced in one step.
        check: takes the file's `predict`, raises where the file is not to be kept.
        opset: version of the operators, 13 to 18.
        halves: as `halved` returns it; these weights are stored so, and cast to float32 before they are used.
        weights: a new file beside `path` for the weights, which a runtime can read without a second copy; by default they are in
            `path`. It stays where this raises.

    Returns:
        What `check` returned.

    Raises:
        errors.ExportError: it cannot be converted; `path` is as it was.
    """
    if not isinstance(opset, int) or not OLDEST <= opset <= OPSET:
        raise errors.ArgumentError(
            f"export.onnx: expected an opset from {OLDEST} to {OPSET}, which tf2onnx writes, got {opset!r}."
        )
    with common.writing(path, ".onnx") as temporary:
        made = _converted(served, model, opset, dict(halves))
        external = {}
        if weights is not None:
            Path(weights).touch(exist_ok=False)  # onnx appends to it, and lets its owner alone read one that it makes
            external = dict(save_as_external_data=True, location=Path(weights).name)
        _imported("onnx").save_model(made, temporary, **external)
        return check(open_file(temporary))


def halved(model):
    """{path of a weight: its values in float16}, of a model's matrices and tables; its vectors, which are few, stay as they are.

    Raises:
        errors.ExportError: a value is none in float16, which ends at 65,504.
    """
    found = {variable.path: variable for variable in model.weights if variable.dtype == "float32" and len(variable.shape) > 1}
    for name, variable in found.items():
        values = keras.ops.convert_to_numpy(variable)
        with np.errstate(over="ignore"):
            found[name] = values.astype(np.float16)
        if not np.isfinite(found[name]).all():
            raise errors.ExportError(
                f"export.onnx of {model.name!r}: expected weights that float16 holds, up to 65,504, got "
                f"{values[~np.isfinite(found[name])][0]:.6g} in {name!r}. Keep the model in float32; nothing was written."
            )
    return found


def open_file(path):
    """The `predict` of an ONNX file of one input, by ONNX Runtime on the CPU: array -> array; images are float32 in [0, 1].

    Raises:
        errors.ExportError: the runtime is missing or refuses the file.
    """
    runtime = _imported("onnxruntime")
    try:
        session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes are bound in C++ and share no other base
        raise errors.ExportError(f"{path}: expected a file that ONNX Runtime opens, got {error}") from error
    (given,), (taken,) = session.get_inputs(), session.get_outputs()
    dtype = {"tensor(float)": np.float32, "tensor(int32)": np.int32}[given.type]
    return lambda array: session.run([taken.name], {given.name: np.asarray(array, dtype)})[0]


def _converted(served, model, opset, halves):
    onnx, tf2onnx = _imported("onnx"), _imported("tf2onnx")
    handlers = {"Erfc": (_erfc, [])}
    function, weights = _of_weights(served, model)
    made, _ = tf2onnx.convert.from_function(function, function.input_signature, opset=opset, custom_op_handlers=handlers)
    _fill(made.graph, weights, halves)
    foreign = {node.op_type for node in made.graph.node if node.domain not in ("", "ai.onnx")}
    strange = foreign | {node.op_type for node in made.graph.node if not onnx.defs.has(node.op_type)}
    if strange:  # tf2onnx writes what it does not know under TensorFlow's name, and says so in a log only
        raise errors.ExportError(
            f"export.onnx of {model.name!r}: expected operators of ONNX only, got {sorted(strange)}; replace the layers that use "
            "them. Nothing was written."
        )
    onnx.checker.check_model(made, full_check=True)
    return made


def _of_weights(served, model):
    """(function of its input and weights, {name of an input: Keras variable}): tf2onnx takes 60 times the bytes of constants."""
    import tensorflow as tf

    weights = {f"weight_{i}": variable for i, variable in enumerate(model.weights) if variable.dtype == "float32"}

    def call(given, *values):
        with keras.StatelessScope(state_mapping=list(zip(weights.values(), values))):
            return served.python_function(given)

    specs = [tf.TensorSpec(variable.shape, tf.float32, name=name) for name, variable in weights.items()]
    return tf.function(call, input_signature=[*served.input_signature, *specs], autograph=False), weights


def _fill(graph, weights, halves):
    """Turns the inputs of an ONNX graph that are weights into constants with the values and paths of the Keras variables."""
    from onnx import TensorProto, helper, numpy_helper

    found = {variable.path: variable for variable in weights.values()}
    nodes, used = [], set()
    for node in graph.node:
        names = [weights[name].path if name in weights else name for name in node.input]
        for name in sorted((set(names) & set(halves)) - used):
            nodes.append(helper.make_node("Cast", [name], [f"{name}:float32"], f"{name}:cast", to=TensorProto.FLOAT))
        used.update(names)
        node.input[:] = [f"{name}:float32" if name in halves else name for name in names]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        numpy_helper.from_array(halves[name] if name in halves else keras.ops.convert_to_numpy(found[name]), name)
        for name in sorted(used & set(found))
    )
    given = [each for each in graph.input if each.name not in weights]
    del graph.input[:]
    graph.input.extend(given)


def _erfc(context, node, name, arguments):
    """erfc(x), which is in the exact GELU and which ONNX lacks, as 1 - erf(x)."""
    import tf2onnx.constants

    del name, arguments
    dtype, shape = context.get_dtype(node.output[0]), context.get_shape(node.output[0])
    inputs, outputs, given = list(node.input), list(node.output), node.name
    context.remove_node(node.name)
    erf = context.make_node("Erf", inputs, dtypes=[dtype], shapes=[shape], domain=tf2onnx.constants.ONNX_DOMAIN)
    one = context.make_const(f"{given}_one", np.ones((), np.float32))
    context.make_node("Sub", [one.output[0], erf.output[0]], name=given, outputs=outputs, dtypes=[dtype], shapes=[shape])


def _imported(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise errors.ExportError(
            f"export.onnx: expected the package {name}, which cannot be imported ({error}); pip install -e '.[export]'."
        ) from error


@common.command
def main(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--opset", type=int, default=OPSET, help=f"{OLDEST} to {OPSET} (default: %(default)s)")
    options = parser.parse_args(argv)
    common.need_tensorflow("export.onnx")
    model = common.build(options.model, options.weights, input_shape=common.shape_of(options.size), classes=options.classes)
    model = common.image_model(model)
    difference, largest = convert(model, options.out, opset=options.opset)
    predict = open_file(options.out)
    common.report(
        options.out, model, weights=options.weights, opset=options.opset, difference=difference, largest=largest,
        **common.speed(predict, model),
        top1=common.accuracies(predict, model, options.dataset, options.split), as_json=options.json,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
