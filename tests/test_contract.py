"""What every constructor promises."""

import warnings

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import errors, zoo
from keras_vit.checkpoints.load import named_weights
from keras_vit.evaluation.classify import accuracy


def mu(**kwargs):
    return keras_vit.ViT_mu(**{"weights": None, **kwargs})


def images(count=2, side=32):
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3)).astype("float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ViT_mu with 7 classes and a representation layer, as a file."""
    path = tmp_path_factory.mktemp("files") / "mu.npz"
    keras_vit.save_npz(randomise(mu(classes=7, representation_size=12)), path)
    return path


def test_the_shared_arguments_are_those_of_keras_applications_in_their_order():
    import inspect

    theirs = list(inspect.signature(keras.applications.ResNet50).parameters)
    ours = list(inspect.signature(keras_vit.ViT_B16).parameters)
    assert ours[:7] == theirs[:7]
    assert keras_vit.ViT_B16.__name__ == "ViT_B16"
    assert "gs://vit_models/imagenet21k/ViT-B_16.npz" in keras_vit.ViT_B16.__doc__


def test_a_file_brings_its_classes_representation_and_resolution(checkpoint):
    model = keras_vit.ViT_mu(weights=checkpoint)
    assert model.output_shape == (None, 7)
    assert model.get_layer("pre_logits").units == 12
    assert model.input_shape == (None, 32, 32, 3)
    info = model.weights_info
    assert (info["source"], info["layout"], len(info["sha256"])) == (str(checkpoint), "pre-linen", 64)


def test_another_number_of_classes_starts_from_a_zero_head_with_the_rest_loaded(checkpoint, caplog):
    model = keras_vit.ViT_mu(weights=checkpoint, classes=3)
    assert len(caplog.records) == 1
    assert "7 classes is replaced" in caplog.text
    assert not np.array(model.get_layer("head").kernel).any()
    whole = keras_vit.ViT_mu(weights=checkpoint)
    for name in ("pre_logits/kernel", "patches/kernel", "block_1/attention/qkv_kernel"):
        np.testing.assert_array_equal(named_weights(model)[name], named_weights(whole)[name])


def test_without_top_the_outputs_are_the_grid_or_a_vector(checkpoint):
    whole = keras_vit.ViT_mu(weights=checkpoint)
    x = images()

    def features(**kwargs):
        return keras_vit.ViT_mu(weights=checkpoint, include_top=False, **kwargs).predict_on_batch(x)

    tokens, vector = keras.Model(
        whole.input, [zoo.tap(whole, "encoder_norm"), zoo.tap(whole, "pre_logits_tanh")]
    ).predict_on_batch(x)
    np.testing.assert_allclose(features(), tokens[:, 1:].reshape(2, 4, 4, 64), atol=1e-5)
    np.testing.assert_allclose(features(classifier="token_unpooled"), tokens, atol=1e-5)
    np.testing.assert_allclose(features(pooling="token"), vector, atol=1e-5)
    kernel, bias = (np.array(getattr(whole.get_layer("pre_logits"), leaf)) for leaf in ("kernel", "bias"))
    np.testing.assert_allclose(features(pooling="avg"), np.tanh(tokens[:, 1:].mean(axis=1) @ kernel + bias), atol=1e-5)


def test_pooling_the_class_token_of_a_model_without_one_is_refused():
    with pytest.raises(errors.ArgumentError, match="has not"):
        mu(include_top=False, pooling="token", classifier="gap")


def test_unpooled_classifiers_score_every_token():
    assert mu(classifier="unpooled", classes=3).output_shape == (None, 16, 3)
    assert mu(classifier="token_unpooled", classes=3).output_shape == (None, 17, 3)


def test_activation_is_the_checkpoints_own_while_its_head_is_kept(checkpoint):
    def activation(**kwargs):
        layer = keras_vit.ViT(**{**zoo.VARIANTS["ViT_mu"].arguments, **kwargs}).get_layer("predictions")
        return layer.activation.__name__

    record = zoo.Weights(str(checkpoint), 7, "sigmoid", resolution=32)
    assert activation(weights=record) == "sigmoid"
    assert activation(weights=record, classes=3) == "softmax"
    assert activation(weights=None, classes=21_843) == "softmax"
    assert activation(weights=record, classifier_activation="relu") == "relu"
    assert "predictions" not in [layer.name for layer in mu(classifier_activation=None).layers]
    with pytest.raises(errors.ArgumentError, match="classifier_activation"):
        mu(classifier_activation="sofmax")


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(input_shape=(33, 32, 3)), r"nearest size is input_shape=\(32, 32, 3\)"),
        (dict(input_shape=(3, 500, 3)), r"nearest size is input_shape=\(8, 496, 3\)"),
        (dict(input_shape=(None, None, 3)), "a model is made for one size"),
        (dict(input_shape=(32, 32, 1)), r"must be \(height, width, 3\)"),
        (dict(input_shape=(32, 32)), r"must be \(height, width, 3\)"),
        (dict(input_tensor=np.zeros((1, 32, 32, 3))), "symbolic Keras tensor"),
        (dict(classes=0), "classes must be"),
        (dict(classes="10"), "classes must be"),
        (dict(classes=True), "classes must be"),
        (dict(classifier="cls"), "classifier in"),
        (dict(positions="rope"), "positions in"),
        (dict(style="timm"), "style in"),
        (dict(pooling="map", include_top=False), "needs what classifier='token' has not"),
        (dict(input_shape=(4, 32, 3), style="big_vision"), "nearest size"),
        (dict(pooling="max", include_top=False), "pooling in"),
        (dict(weights="imagnet"), "got 'imagnet'"),
        (dict(weights=3), "got 3"),
        (dict(weights=["imagenet"]), r"got \['imagenet'\]"),
        (dict(weights="/no/such.npz"), "check the path"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused_with_what_to_do(kwargs, match):
    with pytest.raises(errors.ArgumentError, match=match):
        mu(**kwargs)


def test_numpys_whole_numbers_are_whole_numbers(tmp_path):
    model = mu(classes=np.int64(3), input_shape=(np.int32(16), 16, 3))
    assert model.output_shape == (None, 3)
    model.save(tmp_path / "m.keras")


def test_an_argument_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(zoo.fetch, "fetch", lambda *args: pytest.fail("fetched"))
    for wrong in (dict(classes=0), dict(classifier_activation="sofmax")):
        with pytest.raises(errors.ArgumentError):
            keras_vit.ViT_B16(weights="imagenet21k", **wrong)


def test_an_unknown_tag_lists_the_tags_and_a_variant_without_weights_never_is_random():
    with pytest.raises(errors.ArgumentError, match="'imagenet', 'imagenet21k', 'imagenet21k.imagenet2012'"):
        keras_vit.ViT_B16(weights="imagenet22k")
    with pytest.raises(errors.ArgumentError, match="'imagenet21k'"):
        keras_vit.ViT_H14()
    with pytest.raises(errors.ArgumentError, match="none by name"):
        keras_vit.ViT_S16_gap()


def test_imagenet_is_the_augreg_classifier_nearest_to_the_resolution_else_the_originals():
    def source(name, side=224):
        return zoo.find_weights("imagenet", name, zoo.VARIANTS[name], side).source

    for name in ("ViT_Ti16", "ViT_S16", "ViT_S32", "ViT_B16", "ViT_B32", "ViT_L16"):
        assert source(name).endswith("res_224.npz")
        assert source(name, 384).endswith("res_384.npz")
        assert "/augreg/" in source(name, 512)
    assert source("ViT_B8", 384).endswith("res_224.npz")
    assert source("ViT_L32") == "gs://vit_models/imagenet21k+imagenet2012/ViT-L_32.npz"


def test_a_users_own_tensor_is_built_upon_and_their_layers_left_alone(checkpoint):
    inputs = keras.Input((64, 64, 1))
    three = keras.layers.Conv2D(3, 2, strides=2, name="mine")(inputs)
    model = keras_vit.ViT_mu(input_tensor=three, weights=checkpoint)
    assert model.input_shape == (None, 64, 64, 1)
    assert model.get_layer("mine").output is three
    direct = keras_vit.ViT_mu(weights=checkpoint)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)).astype("float32")
    inner = keras.Model(inputs, three).predict_on_batch(x)
    np.testing.assert_allclose(model.predict_on_batch(x), direct.predict_on_batch(inner), atol=1e-6)
    keras_vit.load_weights(model, checkpoint)  # again, on the finished model


def test_preprocessing_inside_the_model_equals_preprocess_input(checkpoint):
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype="uint8")
    outside, inside = keras_vit.ViT_mu(weights=checkpoint), keras_vit.ViT_mu(weights=checkpoint, include_preprocessing=True)
    np.testing.assert_array_equal(keras_vit.preprocess_input(x), (x.astype("float32") - 127.5) / 127.5)
    np.testing.assert_array_equal(keras_vit.preprocess_input(x, inside), x.astype("float32"))
    expected = outside.predict_on_batch(keras_vit.preprocess_input(x, outside))
    np.testing.assert_allclose(inside.predict_on_batch(keras_vit.preprocess_input(x, inside)), expected, atol=1e-6)


def test_a_zeroed_head_warns_once_and_cannot_be_decoded_or_evaluated(tmp_path):
    model = randomise(mu(classes=7))
    model.get_layer("head").kernel.assign(np.zeros((64, 7)))
    model.get_layer("head").bias.assign(np.zeros(7))
    keras_vit.save_npz(model, tmp_path / "x.npz")
    with pytest.warns(UserWarning, match=r"all zeros.*classes=N.*include_top=False for features\.") as caught:
        model = keras_vit.ViT_mu(weights=tmp_path / "x.npz")
    assert [w.category for w in caught].count(UserWarning) == 1
    with pytest.raises(errors.ArgumentError, match="same score"):
        keras_vit.decode_predictions(model.predict_on_batch(images()))
    with pytest.raises(errors.ArgumentError, match="all zeros"):
        accuracy(model, [(images(), np.eye(7)[:2])])
    model.get_layer("head").kernel.assign(np.ones((64, 7)))  # once trained, it is a head like any other
    assert accuracy(model, [(images(), np.eye(7)[:2])]) in (0, 0.5, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_vit.ViT_mu(weights=tmp_path / "x.npz", classes=3)
        keras_vit.ViT_mu(weights=tmp_path / "x.npz", include_top=False)


def test_fine_tuned_weights_at_another_resolution_warn_once(checkpoint):
    record = zoo.Weights(str(checkpoint), 7, resolution=32, tuned=True)
    with pytest.warns(UserWarning, match="fine-tuned at 32 x 32") as caught:
        model = keras_vit.ViT_mu(weights=record, input_shape=(64, 32, 3))
    assert [w.category for w in caught].count(UserWarning) == 1
    assert model.weights_info["adapted"] == ["tokens/positions: grid 4 x 4 resampled to 8 x 4"]


def test_a_rectangular_checkpoint_brings_its_own_size(tmp_path):
    keras_vit.save_npz(mu(input_shape=(16, 64, 3), classes=2), tmp_path / "wide.npz")
    assert keras_vit.ViT_mu(weights=tmp_path / "wide.npz", classes=2).input_shape == (None, 16, 64, 3)


@pytest.mark.parametrize("include_preprocessing", [False, True])
def test_facts_survive_saving(checkpoint, tmp_path, include_preprocessing):
    model = keras_vit.ViT_mu(weights=checkpoint, include_preprocessing=include_preprocessing)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.weights_info == model.weights_info
    keras_vit.save_npz(again, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as one, np.load(checkpoint) as two:
        assert all(one[key].tobytes() == two[key].tobytes() for key in two)


def test_a_clone_without_its_facts_is_a_model_but_not_one_to_load_into(checkpoint):
    clone = keras.models.clone_model(keras_vit.ViT_mu(weights=checkpoint))
    assert clone.predict_on_batch(images()).shape == (2, 7)
    with pytest.raises(errors.ArgumentError, match="built by keras_vit"):
        keras_vit.load_weights(clone, checkpoint)


def test_a_tap_in_a_rewired_model_belongs_to_that_model():
    model = randomise(mu(classes=4))
    inputs = keras.Input((32, 32, 3))
    x = inputs
    for layer in model.layers[1:]:
        x = layer(x)
    rewired = keras.Model(inputs, x)
    graph = keras.Model(inputs, zoo.tap(rewired, "block_1/scores"))
    expected = keras.Model(model.input, zoo.tap(model, "block_1/scores"))
    np.testing.assert_allclose(graph.predict_on_batch(images()), expected.predict_on_batch(images()), atol=1e-6)
    with pytest.raises(errors.ArgumentError, match="block_0"):
        zoo.tap(model, "blok_0")


def test_predictions_are_named_best_first():
    scores = np.array([[0.1, 0.7, 0.2]])
    assert keras_vit.decode_predictions(scores, top=2, labels=["a", "b", "c"]) == [[("b", "b", 0.7), ("c", "c", 0.2)]]
    with pytest.raises(errors.ArgumentError, match="expected 3 labels, got 2"):
        keras_vit.decode_predictions(scores, labels=["a", "b"])
    with pytest.raises(errors.ArgumentError, match="pass labels"):
        keras_vit.decode_predictions(scores)
    with pytest.raises(errors.ArgumentError, match="shape"):
        keras_vit.decode_predictions(scores[0])


def test_names_are_found():
    assert set(dir(keras_vit)) >= {"ViT", "ViT_B16", "create_model", "hub", "load_weights"}
    with pytest.raises(AttributeError, match="list_models"):
        keras_vit.ViT_B17  # noqa: B018


def test_stochastic_depth_grows_linearly_and_drops_whole_examples():
    model = mu(stochastic_depth_rate=0.5, depth=3)
    assert [model.get_layer(f"block_{i}").drop_path_rate for i in range(3)] == [0, 0.25, 0.5]
    dropped = np.array(keras_vit.layers.DropPath(0.5)(np.ones((64, 3, 2), "float32"), training=True))
    assert set(dropped.reshape(64, -1).min(axis=1)) == {0, 2} == set(dropped.reshape(64, -1).max(axis=1))


def test_dropout_is_alive_in_training_only():
    model = randomise(mu(dropout_rate=0.3, attention_dropout_rate=0.3, stochastic_depth_rate=0.3, classes=3))
    x = images()
    assert np.abs(np.array(model(x, training=True)) - np.array(model(x, training=True))).max() > 1e-4
    np.testing.assert_array_equal(np.array(model(x)), np.array(model(x)))


def test_an_unknown_keyword_is_answered_with_the_known_ones():
    with pytest.raises(TypeError, match=r"ViT_mu\(\) got an unexpected keyword argument 'clases'; its arguments are .* classes"):
        mu(clases=3)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="not divisible"):
        mu(heads=5)
