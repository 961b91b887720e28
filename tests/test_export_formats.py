"""The ways out beside the hub module: LiteRT, ONNX and the original files give what the Keras model gives."""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise, toys

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the converters read TensorFlow's graphs")

tf = pytest.importorskip("tensorflow")

import onnx as onnx_format  # noqa: E402

import keras_vit  # noqa: E402
from export import common, litert, onnx, originals  # noqa: E402
from keras_vit import errors, hub, layers, zoo  # noqa: E402
from keras_vit.checkpoints import files, load  # noqa: E402
from keras_vit.data import pipeline  # noqa: E402
from keras_vit.evaluation import classify  # noqa: E402

NAMES = toys("ViT_mu", "Mixer_mu")
FORMATS = {"onnx": (onnx.convert, onnx.open_file), "tflite": (litert.convert, litert.open_file)}


def made(name, seed=0, **options):
    return randomise(keras_vit.create_model(name, weights=None, **options), seed)


def written(form, model, folder, **options):
    """The `predict` of a file that was just written."""
    convert, open_file = FORMATS[form]
    convert(model, folder / f"model.{form}", **options)
    return open_file(folder / f"model.{form}")


def expected(model, images):
    """Logits of images in [0, 1] by plain `predict`, preprocessed here."""
    images = keras_vit.preprocess_input(images * np.float32(255), model)
    return keras.Model(model.input, zoo.logits(model)).predict(images, batch_size=32, verbose=0)


def agree(got, wanted):
    assert got.shape == wanted.shape and got.dtype == np.float32
    assert np.abs(wanted).max() > 0.1 and (len(wanted) == 1 or np.ptp(wanted, axis=0).max() > 0.01)  # it depends on the images
    return np.abs(got - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def check_ports(path, batch):
    """Only builtin operators; float32 images and logits; a batch of 1, or an open one as -1."""
    found = litert.operators(path.read_bytes())
    assert "FULLY_CONNECTED" in found and not [name for name in found if name.startswith("CUSTOM")]
    interpreter = tf.lite.Interpreter(str(path))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["logits"]}}
    (given,), (taken,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert list(given["shape_signature"]) == [batch, 32, 32, 3]
    assert given["dtype"] == taken["dtype"] == np.float32


@pytest.fixture(scope="module")
def classifier():
    """A ViT_mu that has learned the digits."""
    keras.utils.set_random_seed(0)
    model = keras_vit.ViT_mu(weights=None, classes=10)
    x, y = map(np.concatenate, zip(*common.batches(model, "digits", "train")))
    model.compile(keras.optimizers.Adam(2e-3), "categorical_crossentropy")
    model.fit(x * 2.0 - 1.0, y, batch_size=64, epochs=6, verbose=0)
    return model


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_files_give_the_logits_of_the_model_at_batch_1_7_and_64(name, form, tmp_path):
    model = made(name)
    predict = written(form, model, tmp_path)
    for batch in (1, 7, 64):
        images = common.unit(common.real_images(batch, 32))
        assert agree(predict(images), expected(model, images)), batch
    if form == "tflite":
        check_ports(tmp_path / "model.tflite", batch=-1)


@pytest.mark.slow
def test_vit_b16_gives_its_logits_by_every_way_out(tmp_path, monkeypatch):
    model = common.build("ViT_B16", common.RANDOM)  # the values of a model at its start: of wilder ones float32 itself is unsure
    path = hub.export(model, tmp_path / "module")
    module, layer = tf.saved_model.load(str(path)), hub.HubLayer(path)
    served = module.signatures["serving_default"]
    ways = {
        "hub.load": module, "HubLayer": layer, "serving_default": lambda x: served(images=tf.constant(x))["logits"],
        "features": lambda x: module.features(tf.constant(x))["logits"],
        "LiteRT": written("tflite", model, tmp_path), "ONNX": written("onnx", model, tmp_path),
    }  # fmt: skip
    monkeypatch.setattr(hub.module, "BATCH", 64)
    for batch in (1, 7, 64):
        images = common.unit(common.real_images(batch, 224))
        wanted = expected(model, images)
        found = {way: np.asarray(call(images)) for way, call in ways.items()}
        found["hub.KerasLayer"] = hub.check(path, images)["keras_layer"]
        for way, got in found.items():
            print(f"batch {batch}, {way}: {np.abs(got - wanted).max():.1e} of {np.abs(wanted).max():.2f}")
            assert agree(got, wanted), (batch, way)
    one, other = common.real_images(2, 300)
    contents = [tf.io.encode_png(one).numpy(), tf.io.encode_jpeg(other).numpy()]
    ready = np.stack([pipeline.eval_image(pipeline.decode(tf.constant(data)), 224) for data in contents])
    got = module.signatures["serving_bytes"](image_bytes=tf.constant(contents))["logits"].numpy()
    assert agree(got, keras.Model(model.input, model.get_layer("head").output).predict(ready, verbose=0))


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_without_a_head_gives_its_vector_under_that_name(form, tmp_path):
    model = made("ViT_mu", include_top=False, pooling="token")
    predict = written(form, model, tmp_path)
    images = common.unit(common.real_images(3, 32))
    assert agree(predict(images), model.predict(images * 2.0 - 1.0, verbose=0))
    path = tmp_path / f"model.{form}"
    if form == "onnx":
        names = [output.name for output in onnx_format.load(path).graph.output]
    else:
        names = list(tf.lite.Interpreter(str(path)).get_signature_list()["serving_default"]["outputs"])
    assert names == ["feature_vector"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_exact_gelu_is_kept_exact(form, tmp_path):
    images = keras.Input((8, 8, 3))
    x = keras.layers.Reshape((64, 3))(images)
    x = layers.MLP(16, gelu="exact", name="mlp")(keras.layers.Dense(8, name="wide")(x))
    x = keras.layers.Dense(5, name="head")(keras.layers.GlobalAveragePooling1D()(x))
    model = zoo.Model(images, x, name="exact")
    randomise(model)
    for layer in ("wide", "mlp"):
        for weight in model.get_layer(layer).weights:
            weight.assign(weight * 10.0)  # so that the activation is far from its straight parts, where the two GELUs agree
    predict = written(form, model, tmp_path)
    images = common.unit(common.real_images(7, 8))
    assert agree(predict(images), expected(model, images))
    model.get_layer("mlp").gelu = "tanh"
    assert not agree(predict(images), expected(model, images))  # so that this test would see the difference


@pytest.mark.parametrize("opset", [13, 18])
def test_an_onnx_file_states_its_opset_and_has_named_ports_and_an_open_batch(opset, tmp_path):
    model = made("Mixer_mu")
    onnx.convert(model, tmp_path / "m.onnx", opset=opset)
    file = onnx_format.load(tmp_path / "m.onnx")
    onnx_format.checker.check_model(file, full_check=True)
    (given,), (taken,) = file.graph.input, file.graph.output
    assert [(entry.domain, entry.version) for entry in file.opset_import if entry.domain == ""] == [("", opset)]
    assert (given.name, taken.name) == ("images", "logits")
    sides = [[dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in (given, taken)]
    assert sides == [[0, 32, 32, 3], [0, 1000]]  # 0: open
    assert {port.type.tensor_type.elem_type for port in (given, taken)} == {onnx_format.TensorProto.FLOAT}
    assert {node.domain for node in file.graph.node} == {""}
    images = common.unit(common.real_images(2, 32))
    assert agree(onnx.open_file(tmp_path / "m.onnx")(images), expected(model, images))


@pytest.mark.slow  # for ViT_mu the next test does it
@pytest.mark.parametrize("name", toys())
def test_every_family_becomes_int8(name, tmp_path):
    model = made(name, classes=10)
    seen = [common.unit(common.real_images(16, 32))]
    difference, largest = litert.convert(model, tmp_path / "m.tflite", quantize="int8", representative=seen)
    check_ports(tmp_path / "m.tflite", batch=1)
    assert 1e-4 <= difference <= 0.5 * largest


@pytest.mark.parametrize("quantize, points", [("float16", 0.3), ("dynamic", 1.5), ("int8", 3.0)])
def test_quantisation_costs_few_points_of_accuracy_on_digits(quantize, points, classifier, tmp_path):
    seen = None
    if quantize == "int8":
        seen = [images for images, _ in common.batches(classifier, "digits", "train", count=64)]
        assert sum(map(len, seen)) == 64
    path = tmp_path / "m.tflite"
    difference, _ = litert.convert(classifier, path, quantize=quantize, representative=seen)
    check_ports(path, batch=1 if quantize == "int8" else -1)
    images = common.unit(common.real_images(8, 32))
    measured = np.abs(litert.open_file(path)(images) - expected(classifier, images)).max()
    assert difference == pytest.approx(measured, abs=1e-5) and difference > 1e-5  # it is quantised
    found = common.accuracies(litert.open_file(path), classifier, "digits", "test")
    print(quantize, found)
    assert found["keras"] >= 0.7  # chance is 0.1
    assert found["change"] == found["file"] - found["keras"] and abs(100 * found["change"]) <= points


@pytest.mark.slow
def test_quantised_weights_take_a_quarter_and_float16_a_half(tmp_path):
    sizes = dict(patch_size=8, width=384, depth=2, heads=6, mlp=1536, classes=10)
    model = randomise(keras_vit.ViT(weights=None, input_shape=(32, 32, 3), **sizes))
    seen, sizes = [common.unit(common.real_images(4, 32))], {}
    for quantize in litert.QUANTIZED:
        litert.convert(model, tmp_path / "m.tflite", quantize=quantize, representative=seen if quantize == "int8" else None)
        sizes[quantize] = common.size_of(tmp_path / "m.tflite")
    ratios = {quantize: size / sizes["none"] for quantize, size in sizes.items()}
    print(ratios)
    assert ratios["float16"] <= 0.51 and ratios["dynamic"] <= 0.27 and ratios["int8"] <= 0.27, ratios


def test_top1_is_the_accuracy_that_the_package_computes(classifier):
    batches = pipeline.eval_batches(pipeline.open_source("digits", "test"), size=32, batch=64)
    ours = common.top1(common.keras_predict(classifier), classifier, "digits")
    assert ours == pytest.approx(classify.accuracy(classifier, batches), abs=1 / 360)
    always_0 = np.eye(10, dtype=np.float32)[:1]
    assert common.top1(lambda images: np.repeat(always_0, len(images), 0), classifier, "digits") == pytest.approx(0.1, abs=0.01)


def test_without_its_package_litert_files_are_run_by_tensorflow(classifier, tmp_path, monkeypatch):
    images = common.unit(common.real_images(3, 32))
    first = written("tflite", classifier, tmp_path)(images)
    real = litert.importlib.util.find_spec
    monkeypatch.setattr(litert.importlib.util, "find_spec", lambda name, *_: None if name == "ai_edge_litert" else real(name))
    assert np.abs(litert.open_file(tmp_path / "model.tflite")(images) - first).max() <= 1e-6


def test_a_module_of_the_hub_is_converted_as_it_is(tmp_path, monkeypatch):
    from keras_vit.hub import module

    monkeypatch.setattr(module, "_verify", lambda *_, **__: None)  # in other processes; test_hub.py has it
    model = made("FlexiViT_mu")
    module.export(model, tmp_path / "module", card=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "module"), signature_keys=["serving_default"])
    content = converter.convert()
    assert not [op for op in litert.operators(content) if op.startswith("CUSTOM")]
    (tmp_path / "m.tflite").write_bytes(content)
    images = common.unit(common.real_images(7, 32))
    assert agree(litert.open_file(tmp_path / "m.tflite")(images), expected(model, images))


@pytest.mark.parametrize("form", FORMATS)
def test_a_keras_file_that_computes_in_bfloat16_is_exported_in_float32(form, tmp_path, capsys):
    model = made("ViT_mu", classes=7)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        low = keras_vit.ViT_mu(weights=None, classes=7)
    finally:
        keras.config.set_dtype_policy("float32")
    randomise(low).save(tmp_path / "low.keras")
    predict = written(form, common.build(tmp_path / "low.keras"), tmp_path)
    assert "bfloat16" in capsys.readouterr().err
    images = common.unit(common.real_images(7, 32))
    assert agree(predict(images), expected(model, images))


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_differs_is_not_written_and_the_old_one_stays(form, tmp_path, monkeypatch):
    path = tmp_path / f"model.{form}"
    path.write_bytes(b"old")
    real = common.keras_predict
    monkeypatch.setattr(common, "keras_predict", lambda model: lambda images: real(model)(images) + 1e-3)
    with pytest.raises(errors.ExportError, match="difference of 1.0e-03"):
        FORMATS[form][0](made("FlexiViT_mu"), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("form", FORMATS)
def test_nan_weights_are_refused(form, tmp_path):
    model = made("FlexiViT_mu")
    model.get_layer("head").bias.assign(np.full(1000, np.nan))
    with pytest.raises(errors.ExportError, match="nan"):
        FORMATS[form][0](model, tmp_path / f"model.{form}")
    assert not os.listdir(tmp_path)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    images = keras.Input((8, 8, 3))
    x = keras.layers.Lambda(lambda x: tf.math.bessel_i0e(x), name="bessel")(images)
    x = keras.layers.Dense(5, name="head")(keras.layers.Flatten()(x))
    with pytest.raises(errors.ExportError, match="BesselI0e"):
        onnx.convert(zoo.Model(images, x, name="odd"), tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_original_file_comes_back_with_the_bits_of_every_weight(name, tmp_path):
    model = made(name)
    fresh = originals.write(model, tmp_path / "m.npz")
    again = keras_vit.create_model(name, weights=str(tmp_path / "m.npz"))
    for other in (fresh, again):
        for old, new in zip(model.weights, other.weights, strict=True):
            assert load.to_numpy(old).tobytes() == load.to_numpy(new).tobytes(), old.path
    images = common.unit(common.real_images(2, 32))
    assert np.array_equal(expected(fresh, images), expected(model, images))


def test_a_released_file_comes_back_in_its_own_layout_key_for_key_and_bit_for_bit(tmp_path):
    file = GOLDENS / "vit" / "gap_p16_linen_layout" / "checkpoint.npz"
    with np.load(file) as arrays:
        wanted = dict(arrays)
    sizes = dict(patch_size=16, width=32, depth=2, heads=4, mlp=64, classifier="gap")
    model = keras_vit.ViT(weights=str(file), input_shape=(32, 32, 3), **sizes)
    originals.write(model, tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as arrays:
        assert set(arrays) == set(wanted)
        assert all(arrays[key].tobytes() == wanted[key].tobytes() for key in wanted)


def test_a_weight_that_comes_back_otherwise_is_an_error_and_nothing_is_written(tmp_path, monkeypatch):
    real = keras_vit.load_weights

    def load_weights(model, path):
        real(model, path)
        bias = model.get_layer("head").bias
        bias.assign(bias + 1.0)

    monkeypatch.setattr(keras_vit, "load_weights", load_weights)
    with pytest.raises(errors.ExportError, match="head/bias"):
        originals.write(made("ViT_mu"), tmp_path / "m.npz")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".safetensors"])
def test_an_original_file_is_written_in_the_format_of_its_name(ending, tmp_path):
    model = made("ViT_mu")
    originals.write(model, tmp_path / f"m{ending}")
    assert [path.name for path in tmp_path.iterdir()] == [f"m{ending}"]
    assert isinstance(files.open_file(tmp_path / f"m{ending}"), files.FORMATS[ending])
    again = keras_vit.create_model("ViT_mu", weights=str(tmp_path / f"m{ending}"))
    for old, new in zip(model.weights, again.weights, strict=True):
        assert load.to_numpy(old).tobytes() == load.to_numpy(new).tobytes(), old.path


def test_an_original_file_of_an_unknown_format_is_not_written(tmp_path):
    with pytest.raises(errors.ArgumentError, match="m.h5: expected a file that ends in .npz, .safetensors, .pth"):
        originals.write(made("ViT_mu"), tmp_path / "m.h5")
    assert not os.listdir(tmp_path)


def test_real_images_are_photographs_and_the_same_every_time():
    images = common.real_images(6, (24, 32))
    assert images.shape == (6, 24, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images[:4], common.real_images(4, (24, 32)))
    assert all(np.ptp(image) > 60 and len(np.unique(image)) > 60 for image in images)
    assert len({image.tobytes() for image in images}) == 6
    assert common.unit(images).max() <= 1.0


@pytest.mark.parametrize("command, ending, extra", [
    (onnx, "onnx", ["--opset=15"]), (litert, "tflite", ["--quantize=int8", "--representative=digits"]),
    (originals, "npz", ["--layout=linen"]),
])  # fmt: skip
def test_a_command_prints_one_json_document_of_what_it_wrote(command, ending, extra, tmp_path, capsys):
    out = tmp_path / "new" / f"m.{ending}"
    dataset = [] if command is originals else ["--dataset=digits"]
    given = ["ViT_mu", "--weights=none", "--classes=10", f"--out={out}", *dataset, *extra]
    assert command.main([*given, "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["bytes"] == out.stat().st_size and document["difference"] >= 0 and document["images_per_second"] > 0
    assert "random" in printed.err and os.listdir(out.parent) == [out.name]
    if dataset:
        top1 = document["top1"]
        assert (top1["dataset"], top1["split"]) == ("digits", "test") and top1["change"] == top1["file"] - top1["keras"]


def test_a_command_prints_a_line_for_each_figure(tmp_path, capsys):
    assert onnx.main(["FlexiViT_mu", "--weights=none", "--classes=10", f"--out={tmp_path / 'm.onnx'}", "--dataset=digits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in ("path: ", "bytes on disk: ", "largest difference from the Keras model on real images: ", "images per second: ",
                  "top-1 on digits (test): Keras "):  # fmt: skip
        assert sum(line.startswith(start) for line in lines) == 1, lines


@pytest.mark.parametrize("command, words, message", [
    (onnx, ["ViT_mu", "--out=m.onnx"], "expected --weights, got none"),
    (onnx, ["ViT_mi", "--weights=none", "--out=m.onnx"], "nearest: ViT_mu"),
    (onnx, ["ViT_mu", "--weights=none", "--out=m.tflite"], "expected the name of a .onnx file"),
    (onnx, ["ViT_mu", "--weights=none", "--out=m.onnx", "--opset=19"], "expected an opset from 13 to 18"),
    (onnx, ["ViT_mu", "--weights=none", "--out=m.onnx", "--size=33"], "33"),
    (onnx, ["gone.keras", "--out=m.onnx"], "found nothing"),
    (onnx, ["gone.keras", "--weights=none", "--size=32", "--out=m.onnx"], "got weights, input_shape as well"),
    (litert, ["ViT_mu", "--weights=none", "--out=m.tflite", "--quantize=int8"], "--representative"),
    (litert, ["ViT_mu", "--weights=none", "--out=m.tflite", "--representative=digits"], "takes its ranges"),
    (originals, ["ViT_mu", "--weights=none", "--out=m.npz", "--layout=odd"], "layout must be one of"),
])  # fmt: skip
def test_what_a_user_can_get_wrong_is_one_message_and_exit_status_1(command, words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 1
    assert message in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_damaged_keras_file_and_one_of_another_package_are_refused(tmp_path):
    (tmp_path / "broken.keras").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(errors.ArgumentError, match="cannot be read"):
        common.build(tmp_path / "broken.keras")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "other.keras")
    with pytest.raises(errors.ArgumentError, match="got Sequential"):
        common.build(tmp_path / "other.keras")


@pytest.mark.parametrize("form", FORMATS)
def test_a_head_that_its_publisher_cleared_is_refused(form, tmp_path):
    keras_vit.save_npz(keras_vit.ViT_mu(weights=None), tmp_path / "zero.npz")
    with pytest.warns(UserWarning, match="all zeros"):
        model = common.build("ViT_mu", str(tmp_path / "zero.npz"))
    with pytest.raises(errors.ExportError, match="all-zero head"):
        FORMATS[form][0](model, tmp_path / f"m.{form}")


@pytest.mark.parametrize("form", FORMATS)
def test_another_backend_is_refused_by_name(form, tmp_path, monkeypatch):
    model = made("FlexiViT_mu")
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(errors.ExportError, match="expected the TensorFlow backend, got 'jax'"):
        FORMATS[form][0](model, tmp_path / f"m.{form}")


@pytest.mark.parametrize("form", FORMATS)
def test_more_weights_than_a_file_can_hold_are_refused(form, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LARGEST", 100_000)
    with pytest.raises(errors.ExportError, match="at most 100,000 bytes"):
        FORMATS[form][0](made("FlexiViT_mu"), tmp_path / f"m.{form}")
