"""Published weights by their names, from a server that has files of the published paths, layouts, shapes and sizes."""

import functools
import http.server
import threading

import keras
import numpy as np
import pytest
from released import FILES, arrays

import keras_vit
from keras_vit import zoo
from keras_vit.checkpoints import files
from keras_vit.checkpoints.load import named_weights, to_numpy

FACTS = {path: facts for path, *facts in FILES}
B16 = "vit_models/imagenet21k/ViT-B_16"
AUGREG = "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
TUNED = f"{AUGREG}--imagenet2012-steps_20k-lr_0.01-res_384"


def publish(folder, path):
    """Writes a file of a published name, layout and size, of random numbers; the head of an `imagenet21k` ViT is zero."""
    target, rng = folder / f"{path}.npz", np.random.default_rng(0)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    numbers = {}
    for name, shape in arrays(*FACTS[path][:4]).items():
        zeroed = "/imagenet21k/" in path and name.startswith("head/")
        numbers[name] = np.zeros(shape, "float32") if zeroed else 0.02 * rng.standard_normal(shape, dtype="float32")
    files.write(target, numbers)


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        """Silent."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("buckets")


@pytest.fixture
def asked(folder, monkeypatch):
    """Paths asked of a server of `folder`, which KERAS_VIT_BASE_URL names."""
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("KERAS_VIT_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield server.asked
        server.shutdown()
        thread.join()


def assert_as_loaded_directly(model, build, path, **options):
    ours, direct = named_weights(model), named_weights(build(weights=path, **options))
    assert ours.keys() == direct.keys()
    for name in ours:
        np.testing.assert_array_equal(to_numpy(ours[name]), to_numpy(direct[name]), err_msg=name)
    images = np.random.default_rng(0).uniform(-1, 1, (1, *model.input_shape[1:])).astype("float32")
    assert np.isfinite(model.predict_on_batch(images)).all()


@pytest.mark.slow
def test_the_readmes_first_line_at_true_size(asked, folder):
    publish(folder, B16)
    published = zoo.VARIANTS["ViT_B16"].weights["imagenet21k"].size
    assert abs((folder / f"{B16}.npz").stat().st_size - published) < 0.001 * published
    with pytest.warns(UserWarning, match=r"all zeros.*ViT_B16\(weights='augreg'\) for a real 21k head") as caught:
        model = keras_vit.ViT_B16(weights="imagenet21k")
    assert [w.category for w in caught].count(UserWarning) == 1
    assert model.output_shape == (None, 21_843)
    assert model.get_layer("predictions").activation is keras.activations.sigmoid
    archive = files.Npz(folder / f"{B16}.npz")
    stored = archive.read("Transformer/encoderblock_11/MultiHeadDotProductAttention_1/value/kernel")
    np.testing.assert_array_equal(np.array(model.get_layer("block_11").attention.qkv_kernel)[:, 2], stored)
    info = model.weights_info
    assert (info["source"], info["resolution"], info["layout"]) == (f"gs://{B16}.npz", 224, "pre-linen")
    assert info["sha256"] == archive.sha256
    np.testing.assert_array_equal(model.predict_on_batch(np.zeros((1, 224, 224, 3), "float32")), 0.5)

    tuned = keras_vit.ViT_B16(weights="imagenet21k", classes=10, input_shape=(384, 384, 3))
    assert tuned.weights_info["adapted"] == ["tokens/positions: grid 14 x 14 resampled to 24 x 24"]
    features = keras_vit.ViT_B16(weights="imagenet21k", include_top=False)
    assert features.output_shape == (None, 14, 14, 768)
    for name, weight in named_weights(features).items():
        np.testing.assert_array_equal(to_numpy(weight), to_numpy(named_weights(model)[name]))
    assert asked == [f"/{B16}.npz"]  # one download for all three


SERVED = [
    (keras_vit.FlexiViT_S, dict(weights="i1k", patch_size=8), "big_vision/flexivit/flexivit_s_i1k"),
    (keras_vit.ViT_S32, dict(weights="augreg"), f"vit_models/augreg/{AUGREG}"),
    (keras_vit.ViT_S32, dict(weights=TUNED), f"vit_models/augreg/{TUNED}"),
]
LARGE = [
    (keras_vit.R50_ViT_B16, dict(weights="imagenet"), "vit_models/imagenet21k+imagenet2012/R50+ViT-B_16"),
    (keras_vit.Mixer_L16, dict(weights="imagenet"), "mixer_models/imagenet1k/Mixer-L_16"),
]


def check(build, options, path, asked, folder):
    publish(folder, path)
    model = build(**options)
    assert asked == [f"/{path.replace('+', '%2B')}.npz"]
    assert model.weights_info["source"] == f"gs://{path}.npz"
    others = {key: value for key, value in options.items() if key != "weights"}
    assert_as_loaded_directly(model, build, folder / f"{path}.npz", **others, input_shape=model.input_shape[1:])


@pytest.mark.parametrize("build, options, path", SERVED, ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_published_names_load_as_their_files_do(build, options, path, asked, folder):
    check(build, options, path, asked, folder)


@pytest.mark.slow
@pytest.mark.parametrize("build, options, path", LARGE, ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_large_published_names_load_as_their_files_do(build, options, path, asked, folder):
    check(build, options, path, asked, folder)
