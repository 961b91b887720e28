"""LiT: two towers, each alone and from the files of both; texts; what may go wrong; modules."""

import math

import keras
import numpy as np
import pytest
from conftest import GOLDENS, randomise
from released import LINEN, PRE_LINEN, Shapes, _dense, _encoder, _norm

import keras_vit
from keras_vit import zoo
from keras_vit.checkpoints import files, load
from keras_vit.data.text import WordPiece
from keras_vit.errors import ArgumentError, CheckpointFormatError, CheckpointMismatchError, DownloadError, NonFiniteError
from keras_vit.explain.cost import cost
from keras_vit.models import lit

TEXTS = ["a photo of the digit seven", "two red dogs on the beach", "", "Caf\u00e9 \U0001f600"]
JIT = keras.config.backend() == "jax"


@pytest.fixture(scope="module")
def model():
    return randomise(keras_vit.LiT_mu(weights=None))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("lit") / "x.npz"
    keras_vit.save_npz(model, path)
    return path


def images(count=3):
    return np.random.default_rng(1).uniform(-1, 1, (count, 32, 32, 3)).astype("float32")


def stored(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


# What the published files hold, from configs/models.py and models_lit.py of the original and architectures/bert of flaxformer:
# size of the image tower, text tower (width, depth, hidden width, words, heads of a plain one), heads behind both towers
PUBLISHED = {
    "LiT_B16B": ("B", (768, 12, 3072, 30_522, None), (768, 768)), "LiT_B16B_2": ("B", (768, 12, 3072, 30_522, None), (None, 768)),
    "LiT_L16L": ("L", (1024, 24, 4096, 30_522, None), (None, 1024)), "LiT_L16S": ("L", (384, 12, 1536, 16_000, 6), (None, 1024)),
    "LiT_L16Ti": ("L", (192, 12, 768, 16_000, 3), (None, 1024)),
}  # fmt: skip
SIZES = {  # models_test.py of the original
    "LiT_B16B": 195_871_489, "LiT_B16B_2": 195_280_897, "LiT_L16L": 638_443_521, "LiT_L16S": 331_140_353,
    "LiT_L16Ti": 311_913_089,
}  # fmt: skip


def bert(width, depth, hidden, words):
    root = "BertEncoder_0"
    found = {
        f"{root}/embedder/embedders_{ids}_ids/embedding": (rows, width)
        for ids, rows in (("token", words), ("position", 512), ("segment", 2))
    }
    found |= _norm(f"{root}/layer_norm", width)
    for layer in (f"{root}/encoder_block/layer_sequence/layers_{i}" for i in range(depth)):
        for part in ("attention_layer/query", "attention_layer/key", "attention_layer/value", "dense_layer"):
            found |= _dense(f"{layer}/attention_block/{part}", width, width)
        found |= _dense(f"{layer}/mlp_block/mlp/dense_layer", width, hidden) | _dense(
            f"{layer}/mlp_block/dense_layer", hidden, width
        )
        found |= _norm(f"{layer}/attention_block/layer_norm", width) | _norm(f"{layer}/mlp_block/layer_norm", width)
    return found


def plain(size, width, words, style):
    encoder = _encoder(size, style)
    found = {name.replace("Transformer/", "Encoder_0/"): shape for name, shape in encoder.items()}
    return found | {"Embed_0/embedding": (words, width), "pos_embedding": (1, 16, width)}


def arrays(name, style):
    """{name: shape} of all arrays of a published file, in one of the two styles of blocks."""
    size, (width, depth, hidden, words, heads), heads_behind = PUBLISHED[name]
    images = _encoder(size, style) | {"cls": (1, 1, {"B": 768, "L": 1024}[size])}
    side = images["cls"][-1]
    images |= _dense("embedding", 16, 16, 3, side) | {"Transformer/posembed_input/pos_embedding": (1, 197, side)}
    texts = bert(width, depth, hidden, words) if heads is None else plain({384: "S", 192: "Ti"}[width], width, words, style)
    for tower, read, out in ((images, side, heads_behind[0]), (texts, width, heads_behind[1])):
        tower |= _dense("head", read, out) if out else {}
    found = {f"img/{name}": shape for name, shape in images.items()} | {f"txt/{name}": shape for name, shape in texts.items()}
    return found | {"t": (1,)}


def words(count):
    return WordPiece("\n".join(["[PAD]", "[UNK]", "[CLS]", *(f"w{i}" for i in range(count - 3))]).encode())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_fits_whole_at_full_size(name, monkeypatch):
    """The first one also in the other style of blocks and under a root, the second one also each tower alone."""
    monkeypatch.setattr(load, "_assign", lambda *args: None)
    row, vocabulary = zoo.VARIANTS[name], words(PUBLISHED[name][1][3])
    for style, root in ((LINEN, ""), (PRE_LINEN, "params/"))[: 2 if name == "LiT_B16B" else 1]:
        held = {root + each: shape for each, shape in arrays(name, style).items()}
        monkeypatch.setattr(zoo, "_open", lambda source, size, held=held: Shapes(source, held))
        assert sum(map(math.prod, held.values())) == SIZES[name] == row.params
        assert zoo.identify(zoo._open(row.weights["lit"].source, None)).variants == (name,)
        for towers in ("both", "image", "text") if name == "LiT_B16B_2" else ("both",):
            with keras.StatelessScope(initialize_variables=False):
                model = row.build(towers=towers, vocabulary=vocabulary)
                left_out = set(model.weights_info["ignored"])
                assert model.count_params() == sum(math.prod(shape) for each, shape in held.items() if each not in left_out)
            assert (towers == "both") == (not left_out)
            assert model.weights_info["licence"].startswith("Apache-2.0") and "No deployment" in model.weights_info["card"]
    keras.utils.clear_session()


def test_the_vocabulary_beside_the_weights_is_fetched_and_locked(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    folder = tmp_path / "vit_models" / "lit"
    folder.mkdir(parents=True)
    record = zoo.VARIANTS["LiT_B16B_2"].weights["lit"]
    (folder / "LiT-B16B_2.txt").write_bytes(words(30_522)._data)
    monkeypatch.setattr(zoo, "_open", lambda source, size: Shapes(source, arrays("LiT_B16B_2", LINEN)))
    monkeypatch.setattr(load, "_assign", lambda *args: None)
    with keras.StatelessScope(initialize_variables=False):
        model = keras_vit.LiT_B16B_2()
    assert record.vocabulary == "gs://vit_models/lit/LiT-B16B_2.txt"
    assert model.tokenizer.vocabulary_size == 30_522 and model.tokenizer(["w7"])[0, 1] == 10
    (folder / "LiT-B16B_2.txt").write_bytes(words(30_522)._data.replace(b"w7\n", b"x7\n"))
    with keras.StatelessScope(initialize_variables=False), pytest.raises(DownloadError, match=r"LiT-B16B_2\.txt"):
        keras_vit.LiT_B16B_2()
    keras.utils.clear_session()


@pytest.mark.parametrize("root", ["", "params/"])
def test_each_tower_alone_comes_from_the_file_of_both_and_a_vit_from_its_images(root, model, file, tmp_path):
    path = tmp_path / "y.npz"
    np.savez(path, **{root + name: array for name, array in stored(file).items()})
    x, tokens = images(), model.tokenizer(TEXTS)
    image, text = (keras_vit.LiT_mu(weights=path, towers=towers) for towers in ("image", "text"))
    np.testing.assert_allclose(image.encode_image(x), model.encode_image(x), atol=1e-6)
    np.testing.assert_allclose(text.encode_text(TEXTS), model.encode_text(tokens), atol=1e-6)
    assert image.tokenizer is None and image.text_tower is None and text.image_tower is None
    vit = keras_vit.ViT_mu(weights=path, include_top=False, pooling="token")
    rays = keras.ops.convert_to_numpy(vit(x))
    np.testing.assert_allclose(rays / np.linalg.norm(rays, axis=1, keepdims=True), model.encode_image(x), atol=1e-5)
    assert image.count_params() + text.count_params() + 1 == model.count_params()
    keras_vit.save_npz(text, tmp_path / "t.npz")  # the layout of the file, without what is not its own
    assert set(stored(tmp_path / "t.npz")) == {f"{root}{name}" for name in stored(file) if name.startswith("txt/")}


def test_a_nested_tower_reads_and_writes_its_part_of_a_file(model, file, tmp_path):
    other = keras_vit.LiT_mu(weights=None)
    keras_vit.load_weights(other.text_tower, file)
    np.testing.assert_allclose(other.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-6)
    assert np.abs(other.encode_image(images()) - model.encode_image(images())).max() > 0.01
    keras_vit.save_npz(model.image_tower, tmp_path / "i.npz")
    assert set(stored(tmp_path / "i.npz")) == {name for name in stored(file) if name.startswith("img/")}


def test_names_of_two_towers_never_collide_and_a_file_says_what_it_is(model, file):
    names = load.named_weights(model)
    assert len(names) == len(model.weights) and len({name.partition("/")[0] for name in names}) == 3
    reading = zoo.identify(files.open_file(file))
    assert (reading.family, reading.variants, reading.unknown) == ("LiT", ("LiT_mu",), ())
    told = zoo.explain(files.open_file(file), zoo.VARIANTS["LiT_mu"])
    assert told["problems"] == {} and told["layout"] == "linen-bert"
    with pytest.raises(CheckpointMismatchError, match="family LiT"):
        keras_vit.ViT_mu(weights=file, include_top=False, pooling="token", depth=1)
    case = GOLDENS / "lit" / "text_transformer_d_d" / "checkpoint.npz"
    found = zoo.identify(files.open_file(case)).arguments
    assert (found["text_model"], found["text_heads"], found["classifier"], found["out_dim"]) == (
        "transformer",
        3,
        "gap",
        (16, 16),
    )


def test_embeddings_have_unit_length_and_do_not_hang_on_batches_or_kind_of_texts(model):
    x, z = images(5), model.encode_text(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TEXTS[0]), z[:1], atol=1e-6)
    np.testing.assert_allclose(model.encode_text(model.tokenizer(TEXTS), batch_size=3), z, atol=1e-6)
    np.testing.assert_allclose(model.encode_image(x, batch_size=2), model.encode_image(x), atol=1e-6)
    both = model({"images": x[:4], "tokens": model.tokenizer(TEXTS)})
    both = {name: keras.ops.convert_to_numpy(value) for name, value in both.items()}
    np.testing.assert_allclose(both["text_embeddings"], z, atol=1e-6)
    logits = keras.ops.convert_to_numpy(model.logits(both["image_embeddings"], z))
    np.testing.assert_allclose(logits, model.temperature * both["image_embeddings"] @ z.T, rtol=1e-4, atol=1e-4)
    assert model.encode_text([]).shape == (0, 64) and model.encode_image(x[:0]).shape == (0, 64)


def test_what_fills_up_a_text_is_attended_to_by_none(model):
    tokens = model.tokenizer(TEXTS)
    before, words = model.encode_text(tokens), model.text_tower.get_layer("embedding").words
    value = load.to_numpy(words)
    try:
        words.assign(np.where(np.arange(len(value))[:, None] == 0, value + 3, value))
        np.testing.assert_array_equal(model.encode_text(tokens), before)
    finally:
        words.assign(value)


def test_a_saved_model_keeps_its_texts_its_temperature_and_what_it_is(model, tmp_path):
    model.save(tmp_path / "x.keras")
    again = keras.saving.load_model(tmp_path / "x.keras")
    np.testing.assert_allclose(again.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-6)
    np.testing.assert_allclose(again.encode_image(images()), model.encode_image(images()), atol=1e-6)
    assert (again.temperature, again.variant, again.tokenizer.sha256) == (model.temperature, "LiT_mu", model.tokenizer.sha256)
    assert again.text_tower.tokenizer.sha256 == model.tokenizer.sha256
    assert again.image_tower.weights_info == model.weights_info


def test_mixed_precision_is_close_and_gives_float32(model, file):
    before = keras.config.dtype_policy()
    try:
        for policy in ("mixed_bfloat16", "mixed_float16"):
            keras.config.set_dtype_policy(policy)
            mixed = keras_vit.LiT_mu(weights=file)
            assert mixed.text_tower.get_layer("block_1").compute_dtype != "float32"
            assert {output.dtype for output in mixed.outputs} == {"float32"}
            for got, expected in zip(
                (mixed.encode_text(TEXTS), mixed.encode_image(images())), (model.encode_text(TEXTS), model.encode_image(images()))
            ):
                np.testing.assert_allclose(got, expected, atol=0.05)
    finally:
        keras.config.set_dtype_policy(before)


def test_a_training_step_reaches_every_weight_of_both_towers_and_the_temperature():
    model = keras_vit.LiT(
        input_shape=(8, 8, 3), patch_size=4, width=8, depth=1, heads=2, mlp=8, text_model="transformer", text_width=8,
        text_depth=1, text_heads=2, text_mlp=8, vocabulary_size=9, length=4, bias=-10.0, out_dim=(6, 6),
    )  # fmt: skip
    randomise(model)
    model.temperature = 3.0

    class Pairs(keras.Model):
        def call(self, x):
            found = model(x)
            return model.logits(found["image_embeddings"], found["text_embeddings"])

    before = {name: load.to_numpy(weight) for name, weight in load.named_weights(model).items()}
    learner = Pairs()
    learner.model = model
    learner.compile(
        keras.optimizers.SGD(1.0), keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=JIT, run_eagerly=not JIT
    )
    x = {"images": images()[:2, :8, :8], "tokens": np.array([[1, 2, 3, 4], [5, 6, 7, 8]], "int32")}
    learner.train_on_batch(x, np.eye(2, dtype="float32"))
    for name, weight in load.named_weights(model).items():
        moved = np.abs(load.to_numpy(weight) - before[name])
        moved = moved[[0, 2]] if name.endswith("qkv_bias") else moved  # a key's shifts a query's scores alike
        assert np.isfinite(moved).all() and moved.max() > 0, name


def test_a_vector_of_zeros_has_a_slope():
    x = keras.Variable(np.zeros((2, 3), "float32"))
    layer = keras.Sequential([keras.Input((3,)), lit.UnitLength()])
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            y = layer(x.value)
        assert np.isfinite(tape.gradient(y, x.value).numpy()).all()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x.value)), 0)


def test_costs_are_those_of_the_towers_and_of_a_vit(model):
    vit = cost(keras_vit.ViT_mu(weights=None, include_top=False, pooling="token"))
    assert cost(model.image_tower).macs == vit.macs
    assert cost(model).macs == cost(model.image_tower).macs + cost(model.text_tower).macs == zoo.VARIANTS["LiT_mu"].macs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1, "hot", 1e39])
def test_a_temperature_that_is_no_finite_number_above_0_is_refused(value, model):
    with pytest.raises(ArgumentError, match="finite temperature above 0"):
        model.temperature = value


def test_a_file_whose_temperature_is_not_finite_is_refused(file, tmp_path):
    held = stored(file)
    np.savez(tmp_path / "nan.npz", **{**held, "t": np.float32([np.nan])})
    with pytest.raises(CheckpointFormatError, match="t: 1 of 1 values are not finite"):
        keras_vit.LiT_mu(weights=tmp_path / "nan.npz")
    np.savez(tmp_path / "hot.npz", **{**held, "t": np.float32([100])})
    hot = keras_vit.LiT_mu(weights=tmp_path / "hot.npz")
    with pytest.raises(NonFiniteError, match="model.temperature = 10"):
        hot.temperature  # noqa: B018
    hot.temperature = 10
    assert hot.temperature == pytest.approx(10)


def test_what_does_not_fit_is_refused_by_name(model):
    def refused(match, call, *args, **kwargs):
        with pytest.raises(ArgumentError, match=match):
            call(*args, **kwargs)

    refused("vocabulary size 397, got 5", keras_vit.LiT_mu, weights=None, vocabulary=words(5))
    refused("length 16, got 8", keras_vit.LiT_mu, weights=None, vocabulary=WordPiece(model.tokenizer._data, length=8))
    refused("towers in", keras_vit.LiT_mu, weights=None, towers="none")
    refused("embeddings of one size, got 64 of images and 32", keras_vit.LiT_mu, weights=None, out_dim=(None, 32))
    silent = keras_vit.LiT_mu(weights=None, vocabulary=None, towers="text")
    refused("no tokenizer.*vocabulary=", silent.encode_text, "a dog")
    refused("no image_tower", silent.encode_image, images())
    refused("no similarity", lambda: silent.temperature)
    refused("tokens from 0 to 396, got 0 to 397", silent.encode_text, np.full((1, 16), 397) * np.arange(16).clip(0, 1))
    refused(r"shape \(n, 16\), got int", silent.encode_text, np.zeros((1, 8), int))
    refused("got float64", silent.encode_text, np.zeros((1, 16)))
    refused(r"got uint8.*preprocess_input", model.encode_image, np.zeros((1, 32, 32, 3), np.uint8))
    refused(r"\(n, 32, 32, 3\)", model.encode_image, np.zeros((1, 16, 16, 3), np.float32))
    refused("input_shape", keras_vit.LiT_mu, weights=None, input_shape=(33, 32, 3))


def test_long_texts_are_cut_as_the_original_does_and_unknown_words_are_one_token(model):
    tokens = model.tokenizer(["red " * 40, "\u0416\u0416", "\U0001f600"])
    assert tokens.shape == (3, 16) and len(set(tokens[0, 1:])) == 1
    assert (tokens[1:, 1] == model.tokenizer(["[UNK]x\u0416"])[0, -1] + 1).all()  # [UNK] is 1, what fills up is 0
    np.testing.assert_array_equal(model.encode_text("red " * 40), model.encode_text("red " * 15))


def test_include_preprocessing_maps_0_to_255_within_the_image_tower(model, file):
    raw = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    inside = keras_vit.LiT_mu(weights=file, include_preprocessing=True)
    expected = model.encode_image(keras_vit.preprocess_input(raw, model))
    np.testing.assert_allclose(inside.encode_image(raw), expected, atol=1e-5)
    np.testing.assert_array_equal(keras_vit.preprocess_input(raw, inside), raw)


def test_a_model_is_built_behind_a_tensor_of_the_user(model, file):
    given = keras.Input((32, 32, 3), name="photo")
    behind = keras_vit.LiT_mu(weights=file, input_tensor=keras.layers.Rescaling(0.5, name="half")(given), towers="image")
    np.testing.assert_allclose(behind.encode_image(images()), model.encode_image(images()), atol=0.5)
    found = keras.ops.convert_to_numpy(behind({"images": images()})["image_embeddings"])
    np.testing.assert_allclose(found, model.encode_image(images() * 0.5), atol=1e-5)
