"""Downloads, against a server on this machine; and the README's own line from a file of the released layout and size."""

import http.server
import threading

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints import fetch, files
from keras_vit.checkpoints.load import named_weights

PATH = "vit_models/imagenet21k/ViT-B_16.npz"
SOURCE = f"gs://{PATH}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        status, body, length = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Silent."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server named by KERAS_VIT_BASE_URL; `answer` is (status, body, announced length), `asked` the paths."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("KERAS_VIT_BASE_URL", f"http://127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()
        thread.join()


def kept(tmp_path):
    return [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_a_file_is_downloaded_once_and_verified_ever_after(server, tmp_path):
    server.answer = (200, b"weights", 7)
    path = fetch.fetch(SOURCE)
    assert path.read_bytes() == b"weights"
    assert fetch.fetch(SOURCE) == path
    assert server.asked == [f"/{PATH}"]
    path.write_bytes(b"weightz")
    with pytest.raises(errors.IntegrityError, match="delete the file"):
        fetch.fetch(SOURCE)


def test_a_plus_in_a_name_is_escaped_and_equal_basenames_stay_apart(server):
    server.answer = (200, b"one", 3)
    one = fetch.fetch("gs://vit_models/imagenet21k+imagenet2012/ViT-B_16.npz")
    server.answer = (200, b"two", 3)
    two = fetch.fetch("gs://vit_models/sam/ViT-B_16.npz")
    assert (one.read_bytes(), two.read_bytes()) == (b"one", b"two")
    assert server.asked[0] == "/vit_models/imagenet21k%2Bimagenet2012/ViT-B_16.npz"


@pytest.mark.parametrize(
    "answer, size, error, match",
    [
        ((404, b"<html>no</html>", 15), None, errors.DownloadError, "HTTP 404"),
        ((200, b"half", 8), None, errors.DownloadError, "could not be downloaded"),
        ((200, b"<html>sign in</html>", 20), 400_000_000, errors.IntegrityError, "got 20"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(server, tmp_path, answer, size, error, match):
    server.answer = answer
    with pytest.raises(error, match=match):
        fetch.fetch(SOURCE, size)
    assert kept(tmp_path) == []


def test_a_page_under_the_name_of_a_checkpoint_is_refused_as_what_it_is(server):
    server.answer = (200, b"<html>sign in</html>", 20)
    with pytest.raises(errors.CheckpointFormatError, match="HTML"):
        keras_vit.load_weights(randomise(keras_vit.ViT_mu(weights=None)), SOURCE)


def test_a_base_folder_serves_the_same_paths_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    with pytest.raises(errors.DownloadError, match=f"no file {PATH}"):
        fetch.fetch(SOURCE)
    (tmp_path / PATH).parent.mkdir(parents=True)
    (tmp_path / PATH).write_bytes(b"x")
    assert fetch.fetch(SOURCE) == tmp_path / PATH
    assert fetch.fetch(f"https://storage.googleapis.com/{PATH}") == tmp_path / PATH


@pytest.mark.parametrize(
    "source", ["http://example.com/x.npz", "file:///etc/hostname", "ftp://host/x", "gs://bucket/../x", "https://host/"]
)
def test_other_schemes_and_paths_that_climb_are_refused(source):
    with pytest.raises(errors.DownloadError):
        fetch.fetch(source)


def test_an_unwritable_cache_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "file"))
    with pytest.raises(errors.CacheError, match="KERAS_VIT_HOME"):
        fetch.fetch(SOURCE)


def test_class_names_come_from_the_base_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    index = tmp_path / "download.tensorflow.org" / "data" / "imagenet_class_index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{" + ",".join(f'"{i}": ["n{i:08}", "name_{i}"]' for i in range(1000)) + "}")
    scores = np.eye(1000)[[7]]
    assert keras_vit.decode_predictions(scores, top=1) == [[("n00000007", "name_7", 1.0)]]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with a file of the layout, shapes and size of gs://vit_models/imagenet21k/ViT-B_16.npz, its head zeroed."""
    folder = tmp_path_factory.mktemp("bucket")
    row = zoo.VARIANTS["ViT_B16"]
    with keras.StatelessScope(initialize_variables=False):
        model = row.build(weights=None, classes=21_843, representation_size=768)
    keras.utils.clear_session()
    names, rng, arrays = zoo.FAMILIES["ViT"].layouts["pre-linen"], np.random.default_rng(0), {}
    for ours, weight in named_weights(model).items():
        for original, transform in names.to_original(ours):
            shape = transform.file_shape(weight.shape)
            zeroed = ours.startswith("head/")
            arrays[original] = np.zeros(shape, "float32") if zeroed else 0.02 * rng.standard_normal(shape, dtype="float32")
    (folder / PATH).parent.mkdir(parents=True)
    files.write(folder / PATH, arrays)
    return folder


def test_the_cards_own_line_builds_from_a_file_of_the_released_layout_and_size(released, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(released))
    published = zoo.VARIANTS["ViT_B16"].weights["imagenet21k"].size
    assert abs((released / PATH).stat().st_size - published) < 0.001 * published
    with pytest.warns(UserWarning, match="all zeros") as caught:
        model = keras_vit.ViT_B16(weights="imagenet21k")
    assert [w.category for w in caught].count(UserWarning) == 1
    assert model.output_shape == (None, 21_843)
    assert model.get_layer("predictions").activation is keras.activations.sigmoid
    assert model.count_params() == 86_567_656 - 769_000 + 768 * 769 + 769 * 21_843
    archive = files.Npz(released / PATH)
    stored = archive.read("Transformer/encoderblock_11/MultiHeadDotProductAttention_1/value/kernel")
    np.testing.assert_array_equal(np.array(model.get_layer("block_11").attention.qkv_kernel)[:, 2], stored)
    info = model.weights_info
    assert (info["source"], info["resolution"], info["layout"]) == (SOURCE, 224, "pre-linen")
    scores = model.predict_on_batch(np.zeros((1, 224, 224, 3), "float32"))
    np.testing.assert_array_equal(scores, 0.5)


def test_features_and_new_classes_load_from_the_released_file_without_a_warning(released, monkeypatch, recwarn):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(released))
    assert keras_vit.ViT_B16(weights="imagenet21k", include_top=False).output_shape == (None, 14, 14, 768)
    tuned = keras_vit.ViT_B16(weights="imagenet21k", classes=10, input_shape=(384, 384, 3))
    assert tuned.output_shape == (None, 10)
    assert tuned.weights_info["adapted"] == ["tokens/positions: grid 14 x 14 resampled to 24 x 24"]
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == []
