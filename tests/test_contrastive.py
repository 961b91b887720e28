"""Contrastive training: what the losses are, what is locked, how it is judged; going on; refusals. Replicas: test_strategy.py."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
import test_strategy as strategies
from conftest import randomise
from keras import ops

import keras_vit
from keras_vit import errors, main
from keras_vit.checkpoints.load import named_weights, to_numpy
from keras_vit.configs import lit, lit_digits
from keras_vit.data import pipeline
from keras_vit.data.captions import open_captions
from keras_vit.training import contrastive
from keras_vit.training.contrastive import Judge, PairLoss, paired, ranks, tokenized
from keras_vit.training.objectives import Outputs
from keras_vit.training.optimizers import MomentumSGD
from keras_vit.training.step import Learner

SMALL = dict(width=16, depth=1, heads=2, mlp=16, text_width=16, text_depth=1, text_heads=2, text_mlp=16, patch_size=4)


def toy(**changes):
    given = dict(weights=None, input_shape=(8, 8, 3), out_dim=(16, 16), **SMALL)
    return randomise(keras_vit.LiT_mu(**given | changes))


def units(count, seed, width=8):
    x = np.random.default_rng(seed).standard_normal((count, width))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype("float32")


# ---------------------------------------------------------------- losses


def by_hand(images, texts, positive, temperature, bias=None):
    """The losses of all pairs, as the papers write them, in float64."""
    scores = temperature * images.astype("float64") @ texts.T.astype("float64")
    if bias is not None:
        return np.log1p(np.exp(np.where(positive, -1, 1) * (scores + bias))).sum(1)

    def one_way(scores):
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        return -(np.log(shares) * positive).sum(1) / positive.sum(1)

    return (one_way(scores) + one_way(scores.T)) / 2


def given(duplicated=True):
    """(images, texts, tokens, which belong together by their tokens) of 6 pairs, of which the third and fifth say the same."""
    tokens = np.arange(24).reshape(6, 4)
    if duplicated:
        tokens[4] = tokens[2]
        tokens[5, :3] = tokens[0, :3]  # all but the last
    positive = np.eye(6)
    positive[2, 4] = positive[4, 2] = duplicated
    return units(6, 0), units(6, 1), tokens.astype("int32"), positive


def scale(temperature=7.0, bias=None):
    layer = keras_vit.models.lit.Similarity(temperature, bias)
    layer.build((None, 8), (None, 8))
    return layer


@pytest.mark.parametrize("kind, bias", [("softmax", None), ("sigmoid", -3.0)])
@pytest.mark.parametrize("duplicates", ["negative", "positive"])
def test_losses_are_the_papers(kind, bias, duplicates):
    images, texts, tokens, positive = given()
    layer = PairLoss(scale(bias=bias), kind, duplicates)
    expected = by_hand(images, texts, positive if duplicates == "positive" else np.eye(6), 7.0, bias)
    np.testing.assert_allclose(to_numpy(layer([images, texts, tokens]))[:, 0], expected, rtol=1e-5)


def test_without_duplicates_both_ways_to_take_them_are_the_same():
    images, texts, tokens, _ = given(duplicated=False)
    one, other = (to_numpy(PairLoss(scale(), duplicates=way)([images, texts, tokens])) for way in contrastive.DUPLICATES)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_loss_layer_is_made_again_from_its_configuration():
    layer = PairLoss(scale(5.0, -2.0), "sigmoid", "positive")
    again = PairLoss.from_config(json.loads(json.dumps(layer.get_config())))
    assert (again.kind, again.duplicates, again.scale.first_bias) == ("sigmoid", "positive", -2.0)
    with pytest.raises(errors.ArgumentError, match="PairLoss: kind must be one of softmax, sigmoid"):
        PairLoss(scale(), "hinge")


# ---------------------------------------------------------------- towers


def learner_of(model, towers, **options):
    graph = paired(model, towers, **options)
    learner = Learner(graph.inputs, graph.outputs, objective=Outputs(graph))
    learner.compile(MomentumSGD(0.1), jit_compile=False)
    return learner


def batch(model, count=6):
    images = np.random.default_rng(3).standard_normal((count, 8, 8, 3), np.float32)
    return {"images": images, "tokens": model.tokenizer([f"a photo of the digit {name}" for name in lit_digits.NAMES[:count]])}


def learning(model, towers):
    """{"tower/layer"} of the weights that training may change."""
    own = {id(weight) for weight in learner_of(model, towers).trainable_variables}
    return {"/".join(name.split("/")[:2]) for name, weight in named_weights(model).items() if id(weight) in own}


def test_a_locked_tower_stays_and_what_is_behind_it_learns():
    every = learning(toy(), "uu")
    image = {name for name in every if name.startswith("image_tower/")}
    text = {name for name in every if name.startswith("text_tower/")}
    assert every == image | text | {"similarity/t"} and {"image_tower/block_0", "text_tower/block_0"} < every
    assert learning(toy(), "Lu") == text | {"image_tower/projection", "similarity/t"}
    assert learning(toy(), "uL") == image | {"text_tower/projection", "similarity/t"}
    assert learning(toy(out_dim=(None, None)), "Lu") == {*text, "similarity/t"} - {"text_tower/projection"}


def test_a_locked_tower_draws_no_dropout():
    model = toy(dropout_rate=0.5)
    tower, x = contrastive.Locked(model.image_tower), batch(model)["images"]
    np.testing.assert_array_equal(to_numpy(tower(x, training=True)), to_numpy(model.image_tower(x, training=False)))
    again = contrastive.Locked.from_config(tower.get_config())
    assert again.model.count_params() == model.image_tower.count_params()


def test_embeddings_in_place_of_images_train_the_same():
    plain, model = (toy() for _ in range(2))
    x, before = batch(model), {name: to_numpy(weight).copy() for name, weight in named_weights(plain).items()}
    table = contrastive.backbone(model.image_tower).predict(x["images"], verbose=0)
    learners = learner_of(model, "LU", embedded=True), learner_of(plain, "LU")
    for learner, images in zip(learners, (table, x["images"])):
        learner.fit({**x, "images": images}, np.zeros((6, 1)), batch_size=6, shuffle=False, verbose=0)
    np.testing.assert_allclose(*(learner.history.history["step_loss"] for learner in learners), rtol=1e-5)
    for (name, weight), other in zip(named_weights(model).items(), named_weights(plain).values()):
        np.testing.assert_allclose(to_numpy(weight), to_numpy(other), rtol=1e-4, atol=1e-6, err_msg=name)
        kept = name.startswith("image_tower/") and "projection" not in name
        assert kept == np.array_equal(to_numpy(weight), before[name]) or "bias" in name, name


def test_a_tower_without_a_linear_map_is_locked_whole():
    model = toy(out_dim=(None, None))
    x = batch(model)
    assert contrastive.backbone(model.image_tower) is model.image_tower
    graph = paired(model, "LU", embedded=True)
    losses = to_numpy(graph({**x, "images": model.encode_image(x["images"])}))
    np.testing.assert_allclose(losses, to_numpy(paired(model, "LU")(x)), rtol=1e-5)


def test_the_loss_of_a_model_is_that_of_its_embeddings():
    model = toy(bias=-1.0)
    x = batch(model)
    images, texts = model.encode_image(x["images"]), model.encode_text(x["tokens"])
    for kind, bias in (("softmax", None), ("sigmoid", model.bias)):
        losses = to_numpy(paired(model, "UU", kind)(x))[:, 0]
        np.testing.assert_allclose(losses, by_hand(images, texts, np.eye(6), model.temperature, bias), rtol=1e-4)


@pytest.mark.parametrize("towers, expected", [("LL", "one of them must learn"), ("lu", "got 'lu'"), ("L", "got 'L'"), ("Lx", "")])
def test_towers_that_cannot_be_are_refused(towers, expected):
    with pytest.raises(errors.ArgumentError, match=f"expected two letters of L .locked.*{expected}"):
        paired(toy(), towers)


def test_a_sigmoid_needs_a_bias_and_a_batch_is_not_cut():
    with pytest.raises(errors.ArgumentError, match=r"needs a model with a bias; build it with bias=-10.0"):
        paired(toy(), "uu", "sigmoid")
    with pytest.raises(errors.ArgumentError, match="accum_steps must be 1, got 2"):
        contrastive.check_parts(2)


# ---------------------------------------------------------------- judging


def test_a_rank_counts_what_is_as_near_as_the_nearest_of_its_own():
    keys = np.eye(3, dtype="float32")
    queries = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.1, 0.2, 0.3], [1, 1, 1]], "float32")
    np.testing.assert_array_equal(ranks(queries, keys, [[0], [1], [0, 1], [2]]), [0, 1, 1, 2])


def test_a_model_is_judged_by_all_captions_and_equal_ones_are_right_for_each_other():
    model = toy()
    names = ("zero", "one", "two")
    x = np.stack([np.full((8, 8, 3), value, "float32") for value in (-1.0, 0.1, 1.0, -1.0)])
    said = ["zero\nthe digit zero", "one\nthe digit one", "two\nthe digit two", "zero\nthe digit zero"]
    tests = tf.data.Dataset.from_tensor_slices((x, said)).batch(3)
    sentences = tuple((name, f"the digit {name}") for name in names)
    judged = Judge(model, 4, duplicates="positive", sentences=sentences)(learner_of(model, "uu"), tests)
    images, texts = model.encode_image(x), model.encode_text([text for each in sentences for text in each])
    scores = images @ texts.T
    own = np.array([0, 1, 2, 0])
    best = np.argmax(scores, -1) // 2
    assert judged.examples == 4 and judged.image_to_text[1] == np.mean(best == own)
    assert judged.text_to_image[1] == np.mean([own[np.argmax(scores[:, text])] == text // 2 for text in range(6)])
    centres = texts.reshape(3, 2, -1).mean(1)
    centres /= np.linalg.norm(centres, axis=-1, keepdims=True)
    assert judged.zero_shot == np.mean(np.argmax(images @ centres.T, -1) == own)
    positive = own[:, None] == own[None]
    assert judged.loss == pytest.approx(by_hand(images, texts[own * 2], positive, model.temperature).mean(), rel=1e-4)
    assert list(judged.figures) == ["loss", "image_to_text@1", "image_to_text@5", "text_to_image@1", "zero_shot_accuracy"]
    with pytest.raises(errors.DataError, match="judge: the data set has no examples"):
        Judge(model, 4)(learner_of(model, "uu"), tests.take(0))


def test_embedded_tests_are_judged_like_images():
    model = toy()
    source = open_captions("digits", "test", prompts=("{}", "the digit {}"), class_names=lit_digits.NAMES)
    tests = pipeline.eval_batches(source, size=8, batch=128)
    table = contrastive.backbone(model.image_tower).predict(np.concatenate([x for x, _ in tests]), verbose=0)
    learner = learner_of(model, "LU")
    one, other = (Judge(model, 32, embedded=each)(learner, tests).figures for each in (None, table))
    assert one == pytest.approx(other, rel=1e-5)


# ---------------------------------------------------------------- the main job

OPTIONS = [
    "--config=lit_digits.py", *(f"--config.model.{key}={size}" for key, size in SMALL.items()), "--config.pp.crop=8",
    "--config.model.out_dim=(16, 16)", "--config.total_steps=4", "--config.warmup_steps=1", "--config.batch=16",
    "--config.eval_every=0", "--config.progress_every=0", "--config.checkpoint_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs are, and the weights that they start from."""
    root = tmp_path_factory.mktemp("contrastive")
    keras_vit.save_npz(toy(), root / "start.npz")
    return root


@pytest.fixture(scope="module")
def trained(folder):
    """A run with a locked image tower whose embeddings are kept in a file."""
    config, workdir = main.parse(["main", f"--workdir={folder / 'locked'}", *locked(folder)])
    return main.train(config, workdir)


def locked(folder):
    changes = ["--config.contrastive.towers=LU", "--config.augment=none", f"--config.contrastive.cache={folder / 'cache.npz'}"]
    return [*OPTIONS, f"--config.pretrained_dir={folder}/start.npz", *changes]


def test_a_run_with_a_locked_tower_keeps_its_embeddings_and_says_how_good_it_is(folder, trained):
    assert trained.evaluation.examples == 360 and set(trained.evaluation.image_to_text) == {1, 5, 10}
    with np.load(folder / "cache.npz", allow_pickle=False) as kept:
        assert kept["logits"].shape == (1437, 16)
    start, end = (dict(np.load(path, allow_pickle=False)) for path in (folder / "start.npz", folder / "locked" / "model.npz"))
    same = {name for name in start if np.array_equal(start[name], end[name])}
    assert {name.split("/")[0] for name in same} == {"img"} and "img/head/kernel" not in same
    assert {name for name in start if name.startswith("img/") and not name.startswith("img/head")} <= same
    log = (folder / "locked" / "train.log").read_text()
    assert "captions of the first batch are those of another image: taken as right for each other." in log
    records = [json.loads(line) for line in (folder / "locked" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["zero_shot_accuracy_test"] == trained.evaluation.zero_shot


def test_the_stored_model_can_be_trained_and_reads_texts(folder, trained):
    model = keras.saving.load_model(folder / "locked" / "model.keras")
    assert len(model.trainable_variables) == len(model.variables) - sum("seed" in v.path for v in model.variables)
    texts = ["the digit seven", "seven"]
    np.testing.assert_allclose(model.encode_text(texts), trained.model.encode_text(texts), atol=1e-6)


def test_a_run_goes_on_to_the_same_bits(folder, trained):
    shutil.copytree(folder / "locked", folder / "again")
    newest = max((folder / "again" / "checkpoints").iterdir(), key=lambda path: path.name)
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    config, workdir = main.parse(["main", f"--workdir={folder / 'again'}", *locked(folder)])
    again = main.train(config, workdir)
    assert "Going on after step 2" in (folder / "again" / "train.log").read_text()
    one, other = (list(strategies.steps(folder, name).values()) for name in ("locked", "again"))
    assert [r["loss_hex"] for r in one] == [r["loss_hex"] for r in other]
    for mine, theirs in zip(trained.model.variables, again.model.variables):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))


def test_a_run_does_not_go_on_with_another_locked_tower(folder, trained):
    shutil.copytree(folder / "locked", folder / "other")
    keras_vit.save_npz(randomise(toy(), seed=1), folder / "other.npz")
    changes = [f"--config.pretrained_dir={folder}/other.npz", "--config.contrastive.cache="]
    options = [*locked(folder), *changes, "--config.allow_change=('pretrained_dir', 'contrastive')"]
    with pytest.raises(errors.ResumeError, match="image_tower"):
        main.train(*main.parse(["main", f"--workdir={folder / 'other'}", *options]))


def test_an_image_tower_starts_from_a_vit(folder, tmp_path):
    vit = randomise(
        keras_vit.ViT(weights=None, input_shape=(8, 8, 3), patch_size=4, width=16, depth=1, heads=2, mlp=16, classes=3)
    )
    keras_vit.save_npz(vit, tmp_path / "vit.npz")
    keras_vit.save_npz(toy(), tmp_path / "lit.npz")
    config, _ = main.parse(["main", "--workdir=x", *OPTIONS, "--config.contrastive.towers=Lu"])
    for name in ("vit", "lit"):
        config.contrastive.image_weights = str(tmp_path / f"{name}.npz")
        main.check_config(config)
        found = named_weights(main.build_towers(config).image_tower)
        expected = named_weights(vit if name == "vit" else toy().image_tower)
        for key in ("patches/kernel", "block_0/mlp/fc1/kernel", "tokens/positions"):
            np.testing.assert_array_equal(to_numpy(found[key]), to_numpy(expected[key]))


def test_an_image_tower_that_averages_its_tokens_starts_from_such_a_vit(tmp_path):
    sizes = dict(input_shape=(8, 8, 3), patch_size=4, width=16, depth=1, heads=2, mlp=16)
    vit = randomise(keras_vit.ViT(weights=None, classifier="gap", classes=3, **sizes))
    keras_vit.save_npz(vit, tmp_path / "vit.npz")
    config, _ = main.parse(["main", "--workdir=x", *OPTIONS, "--config.contrastive.towers=Lu"])
    with config.unlocked():
        config.model.classifier = "gap"
    config.contrastive.image_weights = str(tmp_path / "vit.npz")
    found = named_weights(main.build_towers(config).image_tower)
    expected = {key: weight for key, weight in named_weights(vit).items() if not key.startswith("head/")}
    assert "tokens/positions" in expected and "tokens/cls" not in expected
    for key, weight in expected.items():
        np.testing.assert_array_equal(to_numpy(found[key]), to_numpy(weight))


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--config.accum_steps=2"], "config.contrastive: contrastive training: accum_steps must be 1"),
        (["--config.contrastive.towers=LL"], "config.contrastive: towers: expected two letters"),
        (["--config.contrastive.towers=Lu"], r"'Lu': the image tower lacks weights to start from \(''\)"),
        (["--config.contrastive.text_weights=x.npz"], r"'uu': the text tower has weights to start from \('x.npz'\)"),
        (["--config.contrastive.duplicates=ignore"], "config.contrastive.duplicates must be one of negative, positive"),
        (["--config.loss=sigmoid"], "needs a model with a bias"),
        (["--config.mixup=0.5"], "config.trainer='contrastive' knows no labels"),
        (["--config.layer_decay=0.5"], "knows no layer_decay"),
        (["--config.label_smoothing=0.1"], "no label_smoothing"),
        (["--config.model_type=ViT"], "config.model_type must be one of 'LiT', got 'ViT'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options, expected):
    config, _ = main.parse(["main", "--workdir=x", "--config=lit_digits.py", *options])
    with pytest.raises(errors.ConfigError, match=expected):
        main.check_config(config)


def test_the_recipe_is_big_visions():
    config = lit.get_config("LiT_B16B_2,coco_captions")
    values = config.batch, config.total_steps, config.warmup_steps, config.base_lr, config.weight_decay, config.grad_norm_clip
    assert values == (4096, 5000, 150, 1e-3, 0.01, 1.0) and config.contrastive.towers == "Lu" and config.optimizer == "adamw"
    assert lit.get_config("LiT_L16L,x").optimizer == "adafactor" and config.contrastive.text == "captions/text"
    for argument in ("", "LiT_mu", "ViT_B16,x"):
        with pytest.raises(errors.ConfigError, match="lit.py expects MODEL,DATASET|no model of this configuration"):
            lit.get_config(argument)


def test_batches_are_of_images_and_tokens():
    model, source = toy(), open_captions("digits", "train", prompts=("{}",), class_names=lit_digits.NAMES)
    data = tokenized(pipeline.train_batches(source, size=8, batch=4, augment=False), model.tokenizer)
    x, y = next(iter(data))
    assert (
        x["images"].shape == (4, 8, 8, 3) and x["tokens"].dtype == tf.int32 and x["tokens"].shape == (4, 16) and y.shape == (4, 1)
    )
    assert ops.shape(paired(model, "uu")(x)) == (4, 1)
