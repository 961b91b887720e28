"""Zero-shot classification: the published definition, names and prompts of any kind, and classifiers that are like any other."""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from conftest import randomise
from PIL import Image

import keras_vit
from keras_vit import console, errors, zoo
from keras_vit.data import pipeline
from keras_vit.evaluation import prompts, search, validate, zeroshot
from keras_vit.explain import gradcam

COLORS = {"red": (230, 30, 20), "green": (20, 200, 40), "blue": (10, 30, 220)}
SAME = pytest.mark.filterwarnings("ignore:zero_shot. .* the same text")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of LiT_mu: what the towers say is arbitrary, and differs from text to text."""
    path = tmp_path_factory.mktemp("weights") / "mu.npz"
    model = randomise(keras_vit.LiT_mu(weights=None), seed=4)
    model.temperature = 20.0
    keras_vit.save_npz(model, path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    return keras_vit.LiT_mu(weights=weights)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3)).astype("float32")


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_scores_are_those_of_the_mean_embedding_of_each_class(model, images):
    """Of google-research/big_vision: unit vectors, averaged over prompts, of unit length again, times the temperature."""
    names, templates = ["cat", "fire truck", "yellow bird"], prompts.prompts("lit", canonical=True)
    texts = [[template.replace("{}", name) for template in templates] for name in names]
    kernel = np.stack([unit(model.encode_text(each).mean(0)) for each in texts])
    logits = model.temperature * model.encode_image(images) @ kernel.T
    classifier = keras_vit.zero_shot(model, names, "lit")
    np.testing.assert_allclose(classifier.predict(images, verbose=0), softmax(logits), atol=1e-6)
    plain = keras_vit.zero_shot(model, names, "lit", classifier_activation=None)
    np.testing.assert_allclose(plain.predict(images, verbose=0), logits, atol=1e-4)
    assert classifier.weights_info["class_names"] == names and classifier.weights_info["classes"] == 3
    assert classifier.weights_info["prompts"] == list(templates) and classifier.name == "LiT_mu_zero_shot"
    assert np.ptp(logits, axis=1).min() > 0.1  # the names do make a difference


def test_the_classifier_is_one_like_any_other(model, images, tmp_path):
    classifier = keras_vit.zero_shot(model, ["cat", "dog", "bird"], "a photo of a {}")
    scores = classifier.predict(images, verbose=0)
    classifier.save(tmp_path / "c.keras")
    again = keras.saving.load_model(tmp_path / "c.keras")
    np.testing.assert_array_equal(again.predict(images, verbose=0), scores)
    assert again.weights_info == classifier.weights_info and zoo.logits(again).shape == (None, 3)
    names = keras_vit.decode_predictions(scores, top=1, labels=again.weights_info["class_names"])
    assert [each[0][1] for each in names] == [["cat", "dog", "bird"][i] for i in scores.argmax(1)]
    found = gradcam.gradcam(again, images, 1)
    assert found.maps.shape == (5, 32, 32) and found.maps.max() == 1
    again.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    before = [np.array(weight) for weight in again.trainable_weights]
    again.train_on_batch(images, np.arange(5) % 3)
    assert all(np.any(np.array(now) != was) for now, was in zip(again.trainable_weights, before))
    np.testing.assert_array_equal(classifier.predict(images, verbose=0), scores)  # a loaded one is on its own
    with pytest.raises(errors.CheckpointMismatchError, match=r"head/kernel has no name.*\.keras"):
        keras_vit.save_npz(classifier, tmp_path / "c.npz")


def test_it_shares_the_tower_with_the_model(model):
    classifier = keras_vit.zero_shot(model, ["cat", "dog"], "{}")
    theirs = {id(weight) for weight in model.image_tower.weights}
    assert [weight.path for weight in classifier.weights if id(weight) not in theirs] == ["head/kernel"]


@pytest.mark.parametrize("held", [1, 7])
def test_many_classes_are_encoded_in_parts(model, monkeypatch, held):
    names = [f"{color} {thing}" for color in ("red", "green", "blue") for thing in ("cat", "dog", "car")]
    whole = zeroshot.class_embeddings(model, [[name] for name in names], ["{}", "a {}", "the {}"])
    sizes, encode = [], model.encode_text
    monkeypatch.setattr(zeroshot, "TEXTS", held)
    monkeypatch.setattr(type(model), "encode_text", lambda _, texts, **options: sizes.append(len(texts)) or encode(texts))
    found = zeroshot.class_embeddings(model, [[name] for name in names], ["{}", "a {}", "the {}"])
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert max(sizes) == held and sum(sizes) == 27


def test_ten_thousand_classes_work(model, images):
    names = [f"thing {i}" for i in range(10_000)]
    scores = keras_vit.zero_shot(model, names, "class_name_only", batch_size=512).predict(images, verbose=0)
    assert scores.shape == (5, 10_000) and scores.sum(1) == pytest.approx(1, abs=1e-4)


def test_several_names_of_a_class_are_averaged_and_its_label_is_shown(model):
    classes = {"n02084071": ["dog", "pet"], "7": "seven"}
    kernel = keras_vit.zero_shot(model, classes, ["a {}", "the {}"]).get_layer("head").kernel
    expected = unit(model.encode_text(["a dog", "the dog", "a pet", "the pet"]).mean(0)) * model.temperature
    np.testing.assert_allclose(keras.ops.convert_to_numpy(kernel)[:, 0], expected, atol=1e-5)
    assert keras_vit.zero_shot(model, classes).weights_info["class_names"] == ["n02084071", "7"]


def test_names_are_written_as_the_original_evaluates_unless_asked_otherwise(model):
    def kernel(names, templates, **options):
        return keras.ops.convert_to_numpy(keras_vit.zero_shot(model, names, templates, **options).get_layer("head").kernel)

    plain = kernel(["fire truck", "dogs"], ["a photo of a {}"])
    np.testing.assert_array_equal(kernel(["Fire_truck", "dog's"], "A photo of a {}."), plain)
    written = kernel(["fire truck", "dog's"], ["a photo of a {}."], canonicalize=False)
    assert np.abs(written - plain).max(0).min() > 1e-3


@SAME
@pytest.mark.parametrize("name, count", [("imagenet", 1000), ("cifar100", 100), ("pets", 37), ("resisc45", 45)])
def test_published_lists_have_their_classes(model, name, count):
    info = keras_vit.zero_shot(model, name, "class_name_only", batch_size=256).weights_info
    assert len(info["class_names"]) == count and info["prompts"] == ["{}"]
    assert info["class_names"] == list(prompts.class_names(zeroshot.SHORT.get(name, name)))


def test_names_of_any_script_work_and_those_that_look_alike_to_the_tokenizer_are_named(model, images):
    with pytest.warns(UserWarning, match=r"2 classes are the same text.*'犬' = '🐶'\. Give"):
        scores = keras_vit.zero_shot(model, ["cat", "犬", "🐶", "C++ 犬"]).predict(images, verbose=0)
    np.testing.assert_allclose(scores[:, 1], scores[:, 2], atol=1e-6)
    assert np.ptp(scores, axis=1).min() > 1e-4
    long = " ".join(["photo"] * 20) + " {}"
    with pytest.warns(UserWarning, match=r"3 classes are the same text.*shorter prompts"):
        keras_vit.zero_shot(model, ["cat", "dog", "bird"], [long])


def test_a_model_with_a_bias_gives_sigmoid_scores(images):
    model = randomise(keras_vit.LiT_mu(weights=None, bias=-10.0))
    classifier = keras_vit.zero_shot(model, ["cat", "dog"], "{}", classifier_activation="sigmoid")
    logits = model.logits(model.encode_image(images), model.encode_text(["cat", "dog"]))
    np.testing.assert_allclose(
        classifier.predict(images, verbose=0), keras.ops.convert_to_numpy(keras.ops.sigmoid(logits)), atol=1e-6
    )


@pytest.mark.parametrize(
    "names, templates, match",
    [
        ([], "clip", r"list of str, a dict.*imagenet, pets.*got \[\]"),
        (7, "clip", "got 7"),
        ("imagenet22k", "clip", "expected one of imagenet2012"),
        (["cat", 5], "clip", "got no str: 5"),
        (["cat", "cat"], "clip", "got 'cat' twice"),
        (["cat", " "], "clip", r"class ' '.*not empty, got ' '\."),
        (["cat", "?!"], "clip", r"got '\?!', of which.*leaves nothing; pass canonicalize=False"),
        (["C", "C++"], "clip", "'C' and 'C\\+\\+' have the same names, c, in lower case"),
        ({"a": "cat", "b": ["cat"]}, "clip", "'a' and 'b' have the same names, cat"),
        ({"a": []}, "clip", r"got 'a': \[\]"),
        ({"a": ["cat", None]}, "clip", "got None"),
        ({5: "cat"}, "clip", "got 5: "),
        (["cat", "dog"], "clippy", "expected one of clip"),
        (["cat", "dog"], [], r"list of str such as.*got \[\]"),
        (["cat", "dog"], "", "expected one of clip"),
        (["cat", "dog"], ["a photo"], "{} once.*got 'a photo'"),
        (["cat", "dog"], ["{} and {}"], "{} once.*got '{} and {}'"),
        (["cat", "dog"], ["a {0.__class__}"], "{} once"),
        (["cat", "dog"], [None], "got None"),
    ],
)
def test_names_and_prompts_that_cannot_be_used_are_refused(model, names, templates, match):
    with pytest.raises(errors.ArgumentError, match=match):
        keras_vit.zero_shot(model, names, templates)


def test_models_that_cannot_be_used_are_refused(model):
    with pytest.raises(errors.ArgumentError, match="expected a model of images and texts.*got a Functional"):
        keras_vit.zero_shot(keras.Model(model.image_tower.inputs, model.image_tower.outputs), ["cat", "dog"])
    with pytest.raises(errors.ArgumentError, match="classifier_activation in"):
        keras_vit.zero_shot(model, ["cat", "dog"], classifier_activation="relu")
    with pytest.raises(errors.ArgumentError, match="no similarity.*towers='both'"):
        keras_vit.zero_shot(keras_vit.LiT_mu(weights=None, towers="image"), ["cat", "dog"])
    lost = keras_vit.LiT_mu(weights=None)
    lost.get_layer("similarity").t.assign([np.nan])
    with pytest.raises(errors.NonFiniteError, match="temperature"):
        keras_vit.zero_shot(lost, ["cat", "dog"])
    lost.get_layer("similarity").t.assign([1.0])
    lost.text_tower.get_layer("block_0").mlp.fc1.kernel.assign(np.full((64, 128), np.nan))
    with pytest.raises(errors.NonFiniteError, match="embeddings of 2 classes are not finite, such as 'cat'"):
        keras_vit.zero_shot(lost, ["cat", "dog"])
    lost.remember(tokenizer=None)
    with pytest.raises(errors.ArgumentError, match="no tokenizer.*vocabulary="):
        keras_vit.zero_shot(lost, ["cat", "dog"])


# --- the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of six images, one of them broken."""
    root, rng = tmp_path_factory.mktemp("data") / "colors", np.random.default_rng(0)
    for name, color in COLORS.items():
        (root / f"{name}_thing").mkdir(parents=True)
        for i in range(6):
            values = np.clip(rng.normal(color, 20, (10, 12, 3)), 0, 255)
            Image.fromarray(values.astype("uint8")).save(root / f"{name}_thing" / f"{i}.png")
    (root / "blue_thing" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return root


def command(capsys, *words):
    status = console.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, json.loads(out) if "--json" in words and out else out, err


def test_zeroshot_evaluates_a_folder_as_validate_does_and_goes_on_after_an_interruption(  # [E7]
    model, weights, folder, tmp_path, capsys, monkeypatch
):
    words = ("zeroshot", f"LiT_mu:{weights}", folder, "--batch=4", "--json", f"--resume={tmp_path / 'state.json'}")
    classifier = keras_vit.zero_shot(model, ["blue_thing", "green_thing", "red_thing"], "lit")
    source = pipeline.open_source(folder, None, on_error="keep")
    pixels = zoo.pixels_of(model)
    whole = validate.validate(classifier.predict_on_batch, source, size=(32, 32), batch=4, pixels=pixels)
    run, calls = keras.Model.predict_on_batch, []

    def stops(self, x):
        if self.name.endswith("zero_shot"):
            calls.append(len(x))
            if len(calls) == 4:
                raise KeyboardInterrupt
        return run(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "predict_on_batch", stops)
        patch.setattr(validate.validate, "__kwdefaults__", validate.validate.__kwdefaults__ | {"every": 4})
        with pytest.raises(KeyboardInterrupt):
            console.main([str(word) for word in words])
    status, told, err = command(capsys, *words)
    assert status == 0, err
    assert 4 <= told["resumed"] <= 13 and told["examples"] == 18
    assert (told["top1"], told["nll"]) == (whole.evaluation.accuracy, whole.evaluation.nll)
    assert [each["file"] for each in told["unreadable"]] == [str(folder / "blue_thing" / "3.png")]
    assert told["class_names"] == ["blue_thing", "green_thing", "red_thing"] and len(told["prompts"]) == 81
    status, _, err = command(capsys, *words, "--prompts={}")  # other prompts are another classifier
    assert status == 1 and "it holds the counts of another evaluation: model was" in err


def test_zeroshot_takes_names_and_prompts_from_files(weights, folder, tmp_path, capsys):
    (tmp_path / "names.json").write_text('{"red_thing": ["red", "pink"], "green_thing": "green", "blue_thing": "blue"}')
    (tmp_path / "names.txt").write_text("blue\ngreen\nred\n")
    (tmp_path / "prompts.txt").write_text("a {} photo\nthe {} photo\n")
    words = ("zeroshot", f"LiT_mu:{weights}", folder, "--json")
    _, told, _ = command(capsys, *words, f"--classes={tmp_path / 'names.json'}", f"--prompts={tmp_path / 'prompts.txt'}")
    assert told["class_names"] == ["blue_thing", "green_thing", "red_thing"] and told["prompts"] == ["a {} photo", "the {} photo"]
    _, told, _ = command(capsys, *words, f"--classes={tmp_path / 'names.txt'}", "--prompts={}", "--prompts=A {}.", "--verbatim")
    assert told["class_names"] == ["blue", "green", "red"] and told["prompts"] == ["{}", "A {}."]
    status, text, _ = command(capsys, *words[:-1], "--prompts=clip_best")
    assert status == 0 and "prompts" in text and "7: itap of a {}" in text
    (tmp_path / "short.txt").write_text("blue\n")
    (tmp_path / "other.json").write_text('{"red": "red"}')
    for option, match in (
        (f"--classes={tmp_path / 'short.txt'}", "expected a line for each of the 3 classes"),
        (f"--classes={tmp_path / 'other.json'}", "missing: blue_thing, green_thing, red_thing; unknown: red."),
        ("--classes=imagenet", "expected 1,000 classes for --classes=imagenet, got 3"),
        ("--classes=cifar100", "expected the 100 classes of cifar100"),
        ("--classes=cifar10", "nearest: cifar100"),
        ("--prompts=clop", "expected one of clip"),
    ):
        status, _, err = command(capsys, *words[:-1], option)
        assert status == 1 and match in err, err
    status, _, err = command(capsys, "zeroshot", "ViT_mu", folder)
    assert status == 1 and "weights" in err


def test_zeroshot_of_the_digits_takes_their_words(weights, tmp_path, capsys):
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "digits.txt").write_text("\n".join(words))
    _, told, _ = command(
        capsys, "zeroshot", f"LiT_mu:{weights}", "digits", f"--classes={tmp_path / 'digits.txt'}",
        "--prompts=a photo of the digit {}", "--json",
    )  # fmt: skip
    assert told["examples"] == 360 and told["class_names"] == words and 0 <= told["top1"] <= 1


def test_retrieval_of_a_list_of_captions_counts_what_is_broken_as_not_found(model, weights, folder, tmp_path, capsys):
    said = {  # image -> captions; the last one is of an image that is cut off
        "red_thing/0.png": ["a red thing", "something red on a white table"], "green_thing/0.png": ["a green thing"],
        "blue_thing/0.png": ["a blue thing"], "red_thing/1.png": ["a red thing"], "blue_thing/3.png": ["a broken thing"],
    }  # fmt: skip
    lines = [json.dumps({"image": name, "caption": texts}) for name, texts in said.items()]
    lines.append('{"image": "green_thing/4.png", "caption": " "}')
    (folder / "captions.jsonl").write_text("\n".join(lines))
    words = ("retrieval", f"LiT_mu:{weights}", folder / "captions.jsonl", "--batch=2")
    with pytest.warns(UserWarning, match=r"1 image\(s\) without a caption are left out: .*green_thing/4.png"):
        status, told, err = command(capsys, *words, "--json")
    assert status == 0, err
    assert [each["file"] for each in told["unreadable"]] == [str(folder / "blue_thing" / "3.png")]
    assert any("'a red thing'" in note for note in told["notes"])
    pixels = zoo.pixels_of(model)
    images = [pipeline.eval_image(pipeline.read_image(folder / name), 32, pixels) for name in list(said)[:4]]
    texts = [text for each in said.values() for text in each]
    scores = model.encode_image(np.stack(images)) @ model.encode_text(texts).T
    image_of = np.repeat(range(5), [len(each) for each in said.values()])
    same = np.array([[text in said[name] for text in texts] for name in list(said)[:4]])  # by their words
    ties = same & (image_of != np.arange(4)[:, None])
    best = np.where(image_of == np.arange(4)[:, None], scores, -np.inf).max(1, keepdims=True)
    before = np.sum((scores > best + 1e-6) | ties & (np.abs(scores - best) < 1e-6), axis=1)
    assert told["image_to_text"]["at"] == {str(k): np.sum(before < k) / 5 for k in (1, 5, 10)}
    assert told["text_to_image"]["queries"] == 6 and told["text_to_image"]["candidates"] == 4
    assert told["text_to_image"]["at"]["10"] == 5 / 6  # among four all are found, but one is broken
    with pytest.warns(UserWarning, match="without a caption"):
        status, text, _ = command(capsys, *words)
    assert "recall@1" in text and "1, counted as not found: " in text
    status, _, err = command(capsys, *words[:2], tmp_path / "none.tsv")
    assert status == 1 and "none.tsv" in err


def test_search_shows_the_best_images_of_a_folder(model, weights, folder, tmp_path, capsys):
    words = ("search", folder, "a red thing", f"--model=LiT_mu:{weights}", "--top=4", f"--cache={tmp_path / 'cache'}")
    status, told, err = command(capsys, *words, f"--out={tmp_path / 'sheet.png'}", "--json")
    assert status == 0 and "embedded 18 of 18" in err
    found = search.index(model, folder, cache=tmp_path / "cache")
    assert found.added == 0 and told["added"] == 18 and told["images"] == 17
    hits = search.search(model, found, "a red thing", top=4)
    assert [each["name"] for each in told["hits"]] == [hit.name for hit in hits]
    assert [each["score"] for each in told["hits"]] == pytest.approx([hit.score for hit in hits], abs=1e-5)
    assert [each["file"] for each in told["unreadable"]] == ["blue_thing/3.png"] and told["seconds"]["search"] > 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 12 + 4 * (224 + 12)
    status, text, err = command(capsys, *words, f"--out={tmp_path / 'sheet.png'}")
    assert status == 0 and not err and "0 embedded now" in text and told["hits"][0]["name"] in text
    status, _, err = command(capsys, *words, "--out=sheet.jpg")
    assert status == 1 and "ends in .png" in err
    status, _, err = command(capsys, "search", folder, "red", f"--model={folder}/none.keras", f"--out={tmp_path / 's.png'}")
    assert status == 1 and "none.keras" in err
