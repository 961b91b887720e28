"""What modules of the real families compute, in every form that `export` writes, and what they refuse."""

import concurrent.futures
import io
import os
import random
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from conftest import randomise, toys
from PIL import Image

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="modules are written by TensorFlow")

tf = pytest.importorskip("tensorflow")

import keras_vit  # noqa: E402
from keras_vit import zoo  # noqa: E402
from keras_vit.checkpoints.adapt import resample_grid  # noqa: E402
from keras_vit.data import pipeline  # noqa: E402
from keras_vit.data.pixels import IMAGENET, Pixels  # noqa: E402
from keras_vit.errors import ExportError  # noqa: E402
from keras_vit.hub import HubLayer, module, verify  # noqa: E402
from keras_vit.layers.embed import aligned, sincos2d  # noqa: E402

FAMILIES = toys("ViT_mu")
# All that the graphs of modules are made of: arithmetic, shapes, control flow, lists of tensors, random numbers for dropout, the
# module's own variables, and decoding of images. None reads or writes a file, a socket or the screen, or calls Python
SAFE = {
    "Abs", "AddV2", "All", "Assert", "AssignVariableOp", "AvgPool", "BatchMatMulV2", "BiasAdd", "BroadcastTo", "Cast",
    "ConcatV2", "Const", "Conv2D", "DecodeImage", "DecodeRaw", "DisableCopyOnRead", "EnsureShape", "Equal", "Erfc",
    "ExpandDims", "ExtractJpegShape", "FloorDiv", "FloorMod", "GatherV2", "GreaterEqual", "Identity", "IsFinite", "Less",
    "LessEqual", "LogicalAnd", "MatMul", "MaxPool", "Maximum", "Mean", "Minimum", "Mul", "Neg", "NoOp", "Pack", "Pad",
    "Placeholder", "Pow", "Prod", "Range", "ReadVariableOp", "RealDiv", "Relu", "Reshape", "ResizeBilinear", "Round", "Rsqrt",
    "ScaleAndTranslate", "Select", "SelectV2", "Shape", "Softmax", "Sqrt", "Square", "SquaredDifference", "Squeeze",
    "StatefulPartitionedCall", "StatelessIf", "StatelessRandomGetKeyCounter", "StatelessRandomUniformV2", "StopGradient",
    "StridedSlice", "StringJoin", "Sub", "Substr", "Sum", "Tanh", "TensorListFromTensor", "TensorListGetItem",
    "TensorListReserve", "TensorListSetItem", "TensorListStack", "Tile", "Transpose", "Unpack", "VarHandleOp", "While",
}  # fmt: skip
# What loading needs to fill variables from the module's own folder
OF_LOADING = {"MergeV2Checkpoints", "RestoreV2", "SaveV2", "ShardedFilename", "StaticRegexFullMatch"}


def export(model, path, **form):
    """Writes a module without the check by another process, where a test compares by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_verify", lambda *_, **__: None)
        return module.export(model, path, **form)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """(model, folder of its classifier)."""
    model = randomise(keras_vit.create_model(request.param, weights=None, classes=7))
    return model, export(model, tmp_path_factory.mktemp("modules") / request.param)


def images(batch, size=(32, 32)):
    return np.random.default_rng(batch).random((batch, *size, 3), np.float32)


def pixels_of(model):
    return Pixels.from_dict((getattr(model, "weights_info", None) or {}).get("preprocessing", {}))


def expected(model, x, layer=None):
    """What the Keras model makes of images in [0, 1]; its logits, or the output of a layer."""
    tensor = zoo.tap(model, layer) if layer else zoo.logits(model)
    return keras.Model(model.inputs, tensor).predict(pixels_of(model).normalize(x * np.float32(255)), verbose=0)


def assert_close(got, wanted, tolerance=1e-5):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_every_way_in_gives_the_logits_of_the_model(exported, batch):  # [E3]
    model, path = exported
    x, loaded = images(batch), tf.saved_model.load(str(path))
    wanted = expected(model, x)
    assert_close(loaded(x).numpy(), wanted)
    assert_close(loaded.signatures["serving_default"](images=tf.constant(x))["logits"].numpy(), wanted)
    assert_close(loaded.call_infer(x).numpy(), wanted)
    assert_close(HubLayer(path)(x).numpy(), wanted)


def test_features_are_the_blocks_and_scores_of_the_model(exported):
    model, path = exported
    x = images(2)
    found = tf.saved_model.load(str(path)).signatures["features"](images=tf.constant(x))
    blocks = [layer for layer in model.layers if hasattr(layer, "TAPS")]
    names = {layer.name for layer in blocks} | {f"{layer.name}_scores" for layer in blocks if "scores" in layer.TAPS}
    assert set(found) == names | {"logits"} and any("block_" in layer.name for layer in blocks)
    for name in names:
        assert_close(found[name].numpy(), expected(model, x, name.replace("_scores", "/scores")))


def encoded(size, kind, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_files_of_images_are_decoded_and_resized_as_the_pipeline_does(exported):
    model, path = exported
    contents = [encoded((40, 57), "PNG"), encoded((32, 32), "JPEG"), encoded((20, 90), "JPEG"), encoded((64, 33), "WEBP")]
    prepared = np.stack([pipeline.eval_image(pipeline.decode(tf.constant(data)), 32, pixels_of(model)) for data in contents])
    wanted = keras.Model(model.inputs, zoo.logits(model)).predict(prepared, verbose=0)
    served = tf.saved_model.load(str(path)).signatures["serving_bytes"]
    assert_close(served(image_bytes=tf.constant(contents))["logits"].numpy(), wanted)
    for bad, why in (
        (b"no image", "Unknown image|decode"),
        (contents[1][:200], "."),
        (huge(), "more than 64,000,000 pixels|67,108,864"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=why):
            served(image_bytes=tf.constant([contents[0], bad]))
    assert_close(served(image_bytes=tf.constant(contents[:1]))["logits"].numpy(), wanted[:1])


def test_files_of_images_are_cut_as_the_checkpoint_wants_it_and_the_card_says_so(tmp_path):
    model = randomise(keras_vit.ViT_mu(weights=None, classes=7))
    model.remember(weights_info=model.weights_info | {"preprocessing": IMAGENET.asdict()})
    path = export(model, tmp_path / "m")
    contents = [encoded((40, 57), "PNG"), encoded((90, 31), "JPEG")]
    prepared = np.stack([pipeline.eval_image(pipeline.decode(tf.constant(data)), 32, IMAGENET) for data in contents])
    served = tf.saved_model.load(str(path)).signatures["serving_bytes"](image_bytes=tf.constant(contents))["logits"].numpy()
    assert_close(served, keras.Model(model.inputs, zoo.tap(model, "head")).predict(prepared, verbose=0))
    assert operations(path) - SAFE - OF_LOADING == set()
    said = "| resize of serving_bytes | bicubic with antialiasing, the shorter side to 36, then the central 32 x 32 |"
    assert said in (path / "README.md").read_text()


def huge():
    """The start of a PNG that declares 50,000 x 50,000 pixels."""
    side = (50_000).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + side + side + bytes([8, 2, 0, 0, 0]) + bytes(40)


def operations(path):
    """Names of all operations in a module's graph and its functions."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    (meta,) = saved.meta_graphs
    found = {node.op for node in meta.graph_def.node}
    return found | {node.op for function in meta.graph_def.library.function for node in function.node_def}


def test_graphs_are_made_of_safe_operations_only(exported):  # [E4]
    _, path = exported
    assert operations(path) - SAFE - OF_LOADING == set()


def test_bad_inputs_are_refused_and_the_next_good_one_is_answered(exported):  # [E5]
    model, path = exported
    loaded = tf.saved_model.load(str(path))
    served, x = loaded.signatures["serving_default"], images(3)
    wanted = expected(model, x)
    nan, infinite = np.where(x > 0.999, np.nan, x), np.where(x > 0.999, np.inf, x)
    assert np.isnan(nan).any() and np.isinf(infinite).any()
    refused = (ValueError, TypeError, tf.errors.InvalidArgumentError)
    bad = [nan, infinite, x[0], x[None], x[:, :0, :0], x[:, :16], x.astype(np.float64), np.zeros((1, 4096, 4096, 3), np.float32)]
    for each in 20 * bad[:-1] + bad:
        with pytest.raises(refused):
            served(images=tf.constant(each))
    assert served(images=tf.constant(x[:0]))["logits"].shape == (0, 7)
    assert_close(served(images=tf.constant(x))["logits"].numpy(), wanted)


def test_threads_get_equal_answers_and_memory_does_not_grow(tmp_path):  # [E6]
    path = export(randomise(keras_vit.ViT_mu(weights=None, classes=7)), tmp_path / "m")
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    x = [tf.constant(images(2 + i)) for i in range(8)]
    wanted = [served(images=each)["logits"].numpy() for each in x]

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work(i):
        return all(np.array_equal(served(images=x[i])["logits"], wanted[i]) for _ in range(500))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
        before = resident()
        assert all(pool.map(work, range(8)))
    assert resident() <= 1.05 * before


@pytest.mark.parametrize(
    "name",
    ["ViT_mu", *(pytest.param(each, marks=pytest.mark.slow) for each in ("Hybrid_mu", "FlexiViT_mu", "ViT_mu_bv", "DeiT_mu"))],
)
def test_a_module_of_any_size_is_the_model_that_was_loaded_for_that_size(name, tmp_path):
    model = randomise(keras_vit.create_model(name, weights=None, classes=5))
    keras_vit.save_npz(model, tmp_path / "weights.npz")
    path = (module.export if name == "ViT_mu" else export)(model, tmp_path / "any", image_size="any")
    loaded, layer = tf.saved_model.load(str(path)), HubLayer(path)
    for size in ((32, 32), (48, 24), (64, 96)):
        at_size = keras_vit.create_model(name, weights=str(tmp_path / "weights.npz"), input_shape=(*size, 3))
        x = images(3, size)
        for found in (loaded(x), loaded.signatures["serving_default"](images=tf.constant(x))["logits"], layer(x)):
            assert_close(found.numpy(), expected(at_size, x))
    contents = encoded((57, 40), "PNG")
    served = loaded.signatures["serving_bytes"](image_bytes=tf.constant([contents]))["logits"].numpy()
    prepared = pipeline.eval_image(pipeline.decode(tf.constant(contents)), 32, pixels_of(model))[None]
    assert_close(served, keras.Model(model.inputs, zoo.logits(model)).predict(prepared, verbose=0))
    sizes = verify(path)["sizes"]
    for size in ((0, 0), (4, 4), (33, 40), (136, 32)):
        allowed = all(
            least <= side <= most and side % step == 0
            for side, least, step, most in zip(size, sizes["smallest"], sizes["step"], sizes["largest"])
        )
        if allowed:
            assert np.isfinite(loaded(images(1, size))).all()
        else:
            with pytest.raises(tf.errors.InvalidArgumentError, match="images: expected height and width from"):
                loaded.signatures["serving_default"](images=tf.constant(images(1, size)))
    assert sizes["largest"] == [128, 128]
    model = keras.Sequential([keras.Input((48, 24, 3)), HubLayer(path, trainable=True)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [variable.numpy() for variable in model.trainable_variables]
    model.fit(images(4, (48, 24)), np.arange(4), verbose=0)
    assert not any(np.array_equal(a, b) for a, b in zip(before, model.trainable_variables))


def test_positions_are_resampled_in_the_graph_as_in_loading():
    grid = np.random.default_rng(0).standard_normal((24, 14, 5)).astype(np.float32)
    for size in ((22, 14), (24, 7), (1, 30), (37, 1)):  # 24 -> 22 loses its last row
        rows, columns = (aligned(old, tf.constant(new)).numpy() for old, new in zip(grid.shape, size))
        np.testing.assert_allclose(np.einsum("yh,xw,hwd->yxd", rows, columns, grid), resample_grid(grid, size), atol=2e-6)
    found = sincos2d(tf.constant(3), tf.constant(5), 16, keras.ops)
    np.testing.assert_allclose(found, sincos2d(3, 5, 16), rtol=0, atol=1e-12)


def test_sizes_that_weights_fix_are_refused(tmp_path):
    for model in (
        keras_vit.Mixer_mu(weights=None),
        keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Dense(2, name="head")]),
    ):
        with pytest.raises(ExportError, match=r"image_size='any' needs .*, got .*Where weights fix"):
            module.export(model, tmp_path / "m", image_size="any")
    assert os.listdir(tmp_path) == []


def test_tasks_give_what_the_head_reads_and_the_tokens_before_that(exported, tmp_path):
    model, _ = exported
    x = images(2)
    vector = tf.saved_model.load(str(export(model, tmp_path / "fe", task="feature_vector")))
    reads = keras.Model(model.inputs, zoo.tap_input(model, "head"))
    wanted = reads.predict(pixels_of(model).normalize(x * np.float32(255)), verbose=0)
    assert_close(vector(x).numpy(), wanted)
    assert list(vector.signatures["serving_default"].structured_outputs) == ["feature_vector"]
    heads = [layer for layer in model.layers if layer.name in zoo.HEADS]
    assert len(vector.trainable_variables) == len(model.trainable_variables) - 2 * len(heads) < len(model.trainable_variables)
    tokens = tf.saved_model.load(str(export(model, tmp_path / "tokens", task="tokens")))
    last = [layer.name for layer in model.layers if "block_" in layer.name and "class_block" not in layer.name][-1]
    wanted = expected(model, x, "encoder_norm" if any(layer.name == "encoder_norm" for layer in model.layers) else last)
    assert_close(tokens(x).numpy(), wanted.reshape(len(x), -1, wanted.shape[-1]))
    assert list(tokens.signatures["serving_default"].structured_outputs) == ["tokens"]


def test_a_model_without_the_output_of_a_task_is_refused(tmp_path):
    grid = keras_vit.ViT_mu(weights=None, include_top=False)
    for task, match in (
        ("classification", "needs a layer 'head'"),
        ("feature_vector", "one vector for each image, got .*pooling="),
    ):
        with pytest.raises(ExportError, match=match):
            module.export(grid, tmp_path / "m", task=task)
    with pytest.raises(ExportError, match=r"expected task in \('classification', 'feature_vector', 'tokens', .*, got 'fe'"):
        module.export(grid, tmp_path / "m", task="fe")
    with pytest.raises(ExportError, match="expected dtype in .*got 'float64'"):
        module.export(grid, tmp_path / "m", dtype="float64")


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_a_module_computes_in_the_type_asked_for_with_float32_weights(dtype, tmp_path):
    model = randomise(keras_vit.ViT_mu(weights=None, classes=7, dropout_rate=0.1))
    model.get_layer("block_0").trainable = False
    path = (module.export if dtype == "mixed_float16" else export)(model, tmp_path / "m", dtype=dtype)
    loaded, x = tf.saved_model.load(str(path)), images(4)
    assert {v.dtype for v in loaded.trainable_variables} == {tf.float32} and loaded(x).dtype == tf.float32
    assert len(loaded.trainable_variables) == len(model.trainable_variables) < len(model.weights)
    wanted = expected(model, x)
    difference = np.abs(loaded(x) - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < difference < 2e-2
    assert model.get_layer("block_1").compute_dtype == "float32"  # the model itself is left alone


def test_a_module_that_computes_in_float32_is_made_of_a_model_that_does_not(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = randomise(keras_vit.ViT_mu(weights=None, classes=7))
    finally:
        keras.config.set_dtype_policy("float32")
    reference = keras_vit.ViT_mu(weights=None, classes=7)
    for ours, theirs in zip(reference.weights, model.weights):
        ours.assign(theirs)
    path = export(model, tmp_path / "m", dtype="float32")
    assert_close(tf.saved_model.load(str(path))(images(4)).numpy(), expected(reference, images(4)))


def test_keras_own_layer_for_saved_models_trains_one_with_dropout(tmp_path):
    model = randomise(keras_vit.ViT_mu(weights=None, classes=7, dropout_rate=0.5))
    path = export(model, tmp_path / "m")
    layer = keras.layers.TFSMLayer(str(path), call_endpoint="call_infer", call_training_endpoint="call_train")
    x = images(2)
    assert_close(layer(x).numpy(), expected(model, x))
    assert not np.array_equal(layer(x, training=True), layer(x, training=True))


# Killed exports

CHILD = """
import sys, time
import keras_vit
from keras_vit.hub import module
models = [keras_vit.ViT_mu(weights=None, classes=n, name=f"of_{n}") for n in (3, 4)]
module._verify = lambda *_, **__: None  # what comes before and after it is what can be left half done
print("ready", flush=True)
sys.stdin.readline()
while True:
    for model in models:
        module.export(model, sys.argv[1])
        print("exported", flush=True)
"""


def killed(path, kills, seed):
    """Kills exports of two models over one module, in turn, and checks what is left after each; counts what it was."""
    draw, found = random.Random(seed), {"of_3": 0, "of_4": 0}

    def child():
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    spare = child()
    try:
        for _ in range(kills):
            process, spare = spare, child()
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("\n")
            process.stdin.flush()
            start = time.monotonic()
            assert process.stdout.readline() == "exported\n"
            time.sleep(draw.uniform(0, 2 * (time.monotonic() - start)))
            process.kill()
            process.communicate()
            record = verify(path)  # whole
            classes = {"of_3": 3, "of_4": 4}[record["model"]]
            assert tf.saved_model.load(str(path))(images(1)).shape == (1, classes)  # and of one piece
            found[record["model"]] += 1
    finally:
        spare.kill()
        spare.communicate()
    return found


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_export_leaves_the_old_module_or_the_new_one(kills, tmp_path):  # [E1]
    found = killed(tmp_path / "m", kills, seed=kills)
    assert sum(found.values()) == kills
    print(f"{kills} exports killed: {found}")
    export(keras_vit.ViT_mu(weights=None), tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]  # what the killed ones left beside it is gone
