"""Recipes, `inference_time.py`, what the configurations' own keys do, and every command that the documentation prints."""

import ast
import pathlib
import re
import shlex

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_vit import console, errors, main
from keras_vit.configs import (
    beit,
    deit,
    digits,
    gsam,
    inference_time,
    mlp_mixer_i1k,
    models,
    poolformer,
    pretrain,
    sam,
    vit,
    vit_s16_i1k,
)
from keras_vit.data import pipeline
from keras_vit.data.augment import LEVELS
from keras_vit.data.pixels import Pixels
from keras_vit.evaluation import speed

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "keras_vit" / "configs").glob("*.py"))
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "keras_vit" / "main.py", *CONFIGS]


def printed():
    """(file, words after the program's name) of every command line in `TEXTS`, and of every row of options."""
    for path in TEXTS:
        text = path.read_text()
        text = ((ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text).replace("\\\n", " ")
        for line in re.findall(r"(?:python -m keras_vit\.main|(?m:^)keras-vit (?!COMMAND)).*", text):
            words = shlex.split(line.split("`")[0], comments=True)
            if words[3:] or words[0] == "keras-vit":
                yield path.name, words
        for options in re.findall(r"`(--config=.*?)`", text):
            yield path.name, ["python", "-m", "keras_vit.main", "--workdir=runs/row", *shlex.split(options)]


COMMANDS = list(printed())


def test_the_documentation_has_commands_of_all_kinds():
    files = {file for file, _ in COMMANDS}
    assert files >= {"README.md", "training.md", "main.py", "pretrain.py", "sam.py", "inference_time.py"}
    assert sum(file == "training.md" for file, _ in COMMANDS) > 40


@pytest.mark.parametrize("file, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value[2:])[:80])
def test_a_printed_command_parses(file, words):
    if words[0] == "keras-vit":
        console._parser().parse_args(words[1:])
        return
    if words[3:] == ["--help"]:
        return
    config, workdir = main.parse(["main", *words[3:]])
    assert workdir
    if config.trainer == "train":
        main.check_config(config)


def test_help_names_the_results_and_the_exit_status_of_a_run_that_was_asked_to_end(capsys):
    assert main.main(["main", "--help"]) == 0
    out = capsys.readouterr().out
    for name in (*main.RESULTS, "report.md", "metrics.jsonl", "train.log", "checkpoints/", str(main.EXIT_PREEMPTED)):
        assert name in out


def values(config, *names):
    return [config[name] for name in names]


OPTIMIZER = ("loss", "head_bias", "optimizer", "optim_dtype", "base_lr", "weight_decay", "grad_norm_clip")
SCHEDULE = ("decay_type", "warmup_steps", "batch", "total_steps")


def test_augreg_pretraining_has_the_recipes_values():
    config = pretrain.get_config("s16,imagenet2012")
    assert values(config, *OPTIMIZER) == ["sigmoid", -6.9, "adamw", "bfloat16", 0.001, 0.0001, 1.0]
    assert values(config, *SCHEDULE, "augreg") == ["cosine", 10_000, 4_096, 92_897, "medium2"]
    assert config.pp.to_dict() == {"train": "train[:99%]", "test": "validation", "crop": 224}
    assert config.pretrained_dir == "" and config.dataset == "imagenet2012"
    config = pretrain.get_config("b16_gap_norep,imagenet21k")
    assert values(config, "head_bias", "total_steps", "augreg") == [-10.0, 908_203, "light2"]
    assert config.model.classifier == "gap" and config.pp.train == "full[51200:]"
    assert pretrain.get_config("l16,imagenet21k,strong1").augreg == "strong1"
    assert pretrain.get_config("l16,imagenet21k").model.transformer.dropout_rate == 0.0
    assert pretrain.get_config("r50_b16,imagenet21k,none").model.resnet.num_layers == (3, 4, 9)
    for given, message in (
        ("b16", "expects MODEL,RECIPE"),
        ("b16,cifar10", "expects MODEL,RECIPE"),
        ("b16,imagenet2012,heavy", "expected a level of none, light1"),
        ("h14,imagenet2012", "write pretrain.py:h14,imagenet2012,LEVEL"),
        ("b17,imagenet2012", "nearest: b16"),
    ):
        with pytest.raises(errors.ConfigError, match=re.escape(message)):
            pretrain.get_config(given)


def test_the_other_recipes_have_their_sources_values():
    config = vit_s16_i1k.get_config()
    assert values(config, *OPTIMIZER) == ["softmax", 0.0, "adamw", "bfloat16", 0.001, 0.0001, 1.0]
    assert values(config, *SCHEDULE) == ["cosine", 10_000, 1_024, 111_477]
    assert LEVELS[config.augreg] == (2, 10, 0.2) and pretrain.steps("imagenet2012", 300, 1_024) == 371_588
    assert models.arguments(config) | dict(positions="sincos2d", representation_size=384, classifier="gap") == models.arguments(
        config
    )

    config = mlp_mixer_i1k.get_config()
    assert values(config, *OPTIMIZER) == ["sigmoid", -6.9, "adamw", "float32", 0.001, 0.0001, 1.0]
    assert values(config, *SCHEDULE) == ["linear", 10_000, 4_096, 92_897]
    assert config.linear_end == pytest.approx(1e-8) and LEVELS[config.augreg] == (2, 15, 0.5)
    assert config.stochastic_depth_rate == 0.1 and pretrain.steps("imagenet2012", 60, 4_096) == 18_579

    config = gsam.get_config()
    assert values(config, *OPTIMIZER) == ["sigmoid", -10.0, "adamw", "float32", 0.003, 0.001, 1.0]
    assert values(config, *SCHEDULE, "augreg") == ["linear", 10_000, 4_096, 92_897, "none"]
    assert values(config, "two_pass", "rho", "rho_min", "gsam_alpha") == ["gsam", 0.6, 0.1, 0.6]
    assert config.linear_end == pytest.approx(3e-5) and config.model.model_name == "ViT-B_32-gap-norep"

    config = sam.get_config()
    assert values(config, "loss", "head_bias", "two_pass", "rho", "base_lr") == ["softmax", 0.0, "sam", 0.2, 0.003]
    assert config.model.model_name == "ViT-B_16"


def test_gsam_moves_the_weights_by_rho_min_at_the_end_of_a_linear_schedule():
    config, _ = main.parse(["main", "--workdir=w", "--config=gsam.py", *SMALL, *SMALL_VIT])
    learner, schedule = main.build_learner(config, main.build_model(config, 10))
    assert float(learner.two_pass.rho(schedule(config.total_steps))) == pytest.approx(0.1)
    assert float(learner.two_pass.rho(0.003)) == pytest.approx(0.6)


SMALL = [
    "--config.dataset=digits", "--config.pp.train=train", "--config.pp.test=test", "--config.pp.crop=16", "--config.batch=8",
    "--config.accum_steps=2", "--config.total_steps=2", "--config.warmup_steps=1", "--config.shuffle_buffer=64",
]  # fmt: skip
SMALL_VIT = [
    "--config.model.patches.size=(8,8)", "--config.model.hidden_size=16", "--config.model.transformer.num_layers=2",
    "--config.model.transformer.mlp_dim=16", "--config.model.transformer.num_heads=2",
]  # fmt: skip
SMALL_MIXER = [
    "--config.model.patches.size=(8,8)", "--config.model.hidden_dim=16", "--config.model.num_blocks=2",
    "--config.model.tokens_mlp_dim=8", "--config.model.channels_mlp_dim=16",
]  # fmt: skip


@pytest.mark.parametrize(
    "recipe, sizes",
    [
        ("pretrain.py:s16,imagenet2012", SMALL_VIT),
        ("vit_s16_i1k.py", SMALL_VIT),
        ("mlp_mixer_i1k.py", SMALL_MIXER),
        ("gsam.py", SMALL_VIT),
        ("sam.py", SMALL_VIT),
    ],
)
def test_a_recipe_takes_two_steps(recipe, sizes):
    config, _ = main.parse(["main", "--workdir=w", f"--config={recipe}", *SMALL, *sizes])
    main.check_config(config)
    source = pipeline.open_source("digits", "train")
    model = main.build_model(config, source.num_classes)
    learner, _ = main.build_learner(config, model)
    before = [np.array(weight) for weight in learner.trainable_variables]
    batches = main._train_batches(config, source, Pixels())
    history = learner.fit(batches, steps_per_epoch=2, shuffle=False, verbose=0).history
    assert history["healthy"] == [1.0] and np.isfinite(history["step_loss"][0])
    moved = [weight.path for weight, old in zip(learner.trainable_variables, before) if np.any(np.array(weight) != old)]
    assert {"head/kernel", "head/bias"} <= {path.split("/", path.count("/") - 1)[-1] for path in moved}
    assert model.layers[-1].activation is keras.activations.get(config.loss)


def test_head_bias_and_stochastic_depth_reach_the_model():
    options = ["--config=digits", "--config.head_bias=-3", "--config.stochastic_depth_rate=0.3"]
    config, _ = main.parse(["main", "--workdir=w", *options])
    model = main.build_model(config, 10)
    np.testing.assert_array_equal(model.get_layer("head").bias, np.full(10, -3.0, np.float32))
    rates = [model.get_layer(f"block_{i}").drop_path.rate for i in range(4)]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3])


def test_the_configured_schedule_is_the_one_that_trains():
    options = ["--config=digits", "--config.decay_type=rsqrt", "--config.timescale=50", "--config.cooldown_steps=200"]
    config, _ = main.parse(["main", "--workdir=w", *options])
    _, schedule = main.build_learner(config, main.build_model(config, 10))
    assert float(schedule(150)) == pytest.approx(0.03 / 2**0.5)
    assert float(schedule(1_200)) == 0.0
    config, _ = main.parse(["main", "--workdir=w", "--config=digits", "--config.decay_type=linear", "--config.linear_end=0.01"])
    _, schedule = main.build_learner(config, main.build_model(config, 10))
    assert float(schedule(1_200)) == pytest.approx(0.01)


def scalars(folder):
    """{tag: (step, value)} of the events in a folder."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            found |= {value.tag: (event.step, float(tf.make_ndarray(value.tensor))) for value in event.summary.value}
    return found


def test_inference_time_writes_the_originals_scalars_and_one_line(tmp_path, capsys):
    options = ["--config=inference_time.py:ViT_mu", "--config.batch=2", "--config.steps=3", "--config.initial_steps=1"]
    assert main.main(["main", f"--workdir={tmp_path / 'run'}", *options, "--config.image_size=16", "--config.num_classes=3"]) == 0
    found = scalars(tmp_path / "run")
    assert set(found) == {f"imgs_sec_core_{name}" for name in ("min", "max", "mean", "std")}
    assert all(step == 0 for step, _ in found.values())
    low, mean, high = (found[f"imgs_sec_core_{name}"][1] for name in ("min", "mean", "max"))
    assert 0 < low <= mean <= high
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"ViT_mu: {mean:.2f} img/s/core") and "3 batches of 2 at 16 x 16, float32" in line
    assert line in (tmp_path / "run/train.log").read_text()


def test_inference_time_has_the_originals_keys():
    config = inference_time.get_config()
    # vit_jax/configs/inference_time.py of the original
    assert set(config) >= {"model_name", "log_dir", "steps", "initial_steps", "batch", "num_classes", "image_size"}
    assert values(config, "model_name", "steps", "initial_steps", "trainer") == ["ViT-B_32", 30, 10, "inference_time"]


def test_images_per_second_leaves_out_the_calls_before():
    calls = []

    class Model:
        input_shape = (None, 4, 6, 3)

        def predict_on_batch(self, images):
            calls.append(images.shape)

    rates = speed.images_per_second(Model(), 5, steps=3, warm_up=2)
    assert rates.shape == (3,) and np.all(rates > 0)
    assert [tuple(shape) for shape in calls] == [(5, 4, 6, 3)] * 6


REMAT = "--config.remat"


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--config.augreg=light0"], "config.augreg must be one of 'none', 'light1', 'light2', 'medium1'"),
        (["--config.augreg=heavy"], "got 'heavy'"),
        (["--config.optimiser=adamw"], "no key 'optimiser'; nearest: optimizer"),
        (["--config.optimizer=adam"], "config.optimizer must be one of 'sgd', 'adamw', 'adafactor', got 'adam'"),
        (["--config.weigth_decay=1"], "nearest: weight_decay"),
        (["--config.weight_decay=-1"], "config.weight_decay must be at least 0, got -1"),
        (["--config.lr_rules=('head/*',)"], "expected 'PATTERN=FACTOR' such as 'block_0/*=0.1', got 'head/*'"),
        (["--config.lr_rules=('head/*=fast',)"], "got 'head/*=fast'"),
        (["--config.lr_rules=('=1',)"], "got '=1'"),
        (["--config.lr_rules=('head/*=-1',)"], "got 'head/*=-1'"),
        (["--config.lr_rules=('haed/*=0.5',)"], "'haed/*' of rules fits none of"),
        (["--config.layer_decay=1.5"], "config.layer_decay must be at most 1, got 1.5"),
        (["--config.ema=1.0"], "config.ema must be below 1, got 1.0"),
        (["--config.ema=-0.1"], "config.ema must be at least 0, got -0.1"),
        (["--config.erasing=2.0"], "config.erasing must be at most 1, got 2.0"),
        (["--config.stochastic_depth_rate=1.0"], "config.stochastic_depth_rate must be below 1, got 1.0"),
        (["--config.loss=hinge"], "config.loss must be one of 'softmax', 'sigmoid', got 'hinge'"),
        (["--config.decay_type=stair"], "config.decay_type must be one of 'cosine', 'linear', 'rsqrt', got 'stair'"),
        (["--config.cooldown_steps=2000"], "cooldown_steps must be at least 0 and at most the 1100 steps"),
        (["--config.two_pass=asam"], "config.two_pass must be one of 'none', 'sam', 'gsam', got 'asam'"),
        (["--config.two_pass=gsam", "--config.rho_min=0.2"], "0 < rho_min <= rho_max"),
        (["--config.precision=float16"], "config.precision must be one of 'float32', 'mixed_bfloat16', 'mixed_float16'"),
        ([REMAT, "--config.model.transformer.dropout_rate=0.1"], "would draw other dropout masks"),
        ([REMAT, "--config.stochastic_depth_rate=0.1"], "set stochastic_depth_rate to 0"),
        ([REMAT, "--config.two_pass=sam"], "set config.two_pass to none"),
        (["--config.steps_on_device=7"], "config.total_steps must be a multiple of config.steps_on_device, got 1200 and 7"),
        (["--config.steps_on_device=3"], "config.eval_every must be a multiple of config.steps_on_device, got 100 and 3"),
        (["--config.strategy=horovod"], "strategy 'horovod': on tensorflow there are auto, one_device, mirrored"),
        (["--config.strategy=data_parallel"], "it is one of jax: set KERAS_BACKEND=jax"),
        (["--config.strategy=one_device", "--config.model_axis=2"], "model_axis is for strategy 'model_parallel'"),
        (["--config.keep_checkpoints=1"], "config.keep_checkpoints must be at least 2, got 1"),
        (["--config.on_save_error=ignore"], "config.on_save_error must be one of 'stop', 'continue'"),
        (["--config.on_error=ignore"], "config.on_error must be one of 'raise', 'skip'"),
        (["--config.profile=5"], "config.profile must be FIRST,LAST"),
        (
            ["--config.trainer=inference_time"],
            "config.trainer must be one of 'train', 'masked', 'tokenizer', 'contrastive', got 'inference_time'",
        ),
        (["--config=inference_time.py", "--config.batch=0"], "config.batch must be at least 1, got 0"),
        (["--config=inference_time.py", "--config.precision=int8"], "config.precision must be one of float32"),
        (["--config=inference_time.py:ViT-B_17"], "nearest: ViT-B_16"),
        (["--config=inference_time.py", "--config.num_class=1"], "no key 'num_class'; nearest: num_classes"),
        (["--config=pretrain.py:b16"], "pretrain.py expects MODEL,RECIPE[,LEVEL]"),
        (["--config=pretraining.py"], "this package has augreg.py, beit.py, deit.py"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_in_a_new_key_is_one_message_and_nothing_is_written(options, expected, tmp_path, capsys):
    assert main.main(["main", f"--workdir={tmp_path / 'run'}", *options]) == 1
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message and len(message.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_models_own_keys_stay_the_originals():
    assert set(vit.get_config("b16,cifar10").model) == {
        "model_name", "patches", "hidden_size", "transformer", "classifier", "representation_size",
    }  # fmt: skip
    config = vit.get_config("mixer_b16,cifar10")
    with config.unlocked():
        config.model.positions = "learned"
    with pytest.raises(errors.ConfigError, match="positions"):
        models.arguments(config)


def test_the_recipes_of_deit_poolformer_and_beit_have_their_authors_values():
    config = deit.get_config("s16")
    assert (config.batch, config.base_lr, config.repeats, config.ema) == (1024, 1e-3, 3, 0.99996)
    assert (config.mixup, config.cutmix, config.erasing, config.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert (config.total_steps, config.warmup_steps) == (300 * 1251, 5 * 1251)
    assert config.weight_decay == pytest.approx(0.05 * config.base_lr) and config.grad_norm_clip == 0
    assert tuple(config.randaugment) == (2, 9.0, 0.5) and models.arguments(config)["stochastic_depth_rate"] == 0.1
    assert poolformer.DROP_PATH == {"S12": 0.1, "S24": 0.1, "S36": 0.2, "M36": 0.3, "M48": 0.4}
    config = poolformer.get_config("s16")
    assert (config.base_lr, config.repeats, config.ema, config.stochastic_depth_rate) == (1e-3, 1, 0.0, 0.1)
    base, large = beit.get_config("BEiT_B16"), beit.get_config("BEiT_L16")
    assert (base.base_lr, base.layer_decay, base.total_steps, base.warmup_steps) == (4e-3, 0.65, 100 * 1251, 20 * 1251)
    assert (large.base_lr, large.layer_decay, large.total_steps, large.stochastic_depth_rate) == (1e-3, 0.75, 50 * 1251, 0.2)
    for config in (base, large):
        main.check_config(config)


def test_a_recipe_of_timms_descendants_takes_a_step(tmp_path):
    config = deit.get_config("BEiT_mu")
    with config.unlocked():
        config.pp = digits.get_config().pp
    config.update(dict(dataset="digits", batch=6, accum_steps=1, total_steps=2, warmup_steps=1, eval_every=0, export=False))
    config.pp.crop = 16
    trained = main.train(config, tmp_path / "run")
    assert trained.model.family == "BEiT" and trained.evaluation.examples == 360


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(randaugment=(2, 9.0)), "config.randaugment must be"),
        (dict(randaugment=(2, 9.0, 0.5), augreg="light2"), "two kinds of RandAugment"),
        (dict(repeats=0), "config.repeats must be at least 1"),
        (dict(model_type="ResNet"), "config.model_type must be one of"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, expected):
    config = digits.get_config()
    config.update(changes)
    with pytest.raises(errors.ConfigError, match=expected):
        main.check_config(config)


def test_another_familys_arguments_are_named_where_one_is_unknown():
    config = deit.get_config("BEiT_mu")
    with config.unlocked():
        config.model.stem = "hmlp"
    with pytest.raises(errors.ConfigError, match=r"a BEiT takes none of \['stem'\]"):
        models.arguments(config)
