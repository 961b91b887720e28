r"""Fine-tunes, evaluates and exports one model: the main job.

python -m keras_vit.main --workdir=runs/digits
python -m keras_vit.main --workdir=runs/cifar10 --config=keras_vit/configs/vit.py:b16,cifar10 \
    --config.pretrained_dir=gs://vit_models/imagenet21k --config.batch=256

--config is a file, or the name of one in keras_vit/configs (vit.py:b16,cifar10); without it, digits.py. Every key is described in
configs/common.py and set by --config.KEY=VALUE. In --workdir it leaves

    model.keras   the model, scores out: keras.saving.load_model after `import keras_vit`
    model.npz     its weights in the original's layout
    module/       the TF-Hub module: RGB in [0, 1] in, logits out
    report.md, report/   how it went: curves, confusions, worst mistakes, configuration
    metrics.jsonl        loss, learning rate and gradient norm of every step
    train.log, events.out.tfevents.*   what was printed, and TensorBoard events
    checkpoints/  the whole state: the same command again goes on from the newest, to the same bits

On SIGTERM (a preempted machine) or Ctrl-C it saves the state and exits with 143; a second signal ends it at once.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import shlex
import sys
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

import keras_vit
from keras_vit import errors, hub, teachers, zoo
from keras_vit.checkpoints import fetch, files, load
from keras_vit.configs import models
from keras_vit.data import captions, pipeline
from keras_vit.data.augment import LEVELS, augreg_level, shifted
from keras_vit.data.pixels import Pixels
from keras_vit.evaluation import classify, speed
from keras_vit.evaluation.sample import training_sample
from keras_vit.training import callbacks, contrastive, dvae, finetune, masked, objectives, optimizers, report, state, strategy
from keras_vit.training.losses import SigmoidCrossEntropy
from keras_vit.training.metrics import Metrics
from keras_vit.training.schedules import DECAYS, WarmupDecay
from keras_vit.training.step import Learner
from keras_vit.training.twopass import GSAM, SAM

CONFIGS = Path(__file__).parent / "configs"
RESULTS = ("model.keras", "model.npz", "module")
UNIT = dict(mean=(0.0,) * 3, std=(255.0,) * 3)  # of the `Pixels` that an exported module takes
MODULE_TOLERANCE = 1e-5
_BLAMED = 16  # examples of a bad batch that are named
_BATCH = 32  # images that the module and the model are given at once
_CHUNK = 2**28  # numbers in the images sent to the other process at once: 1 GiB

_CHOICES = dict(
    trainer=("train", "masked", "tokenizer", "contrastive"),
    augment=("crop_flip", "shift", "none"),
    augreg=tuple(LEVELS),
    decay_type=DECAYS,
    optim_dtype=optimizers.TRACE_DTYPES,
    optimizer=("sgd", "adamw", "adafactor"),
    two_pass=("none", "sam", "gsam"),
    loss=("softmax", "sigmoid"),
    precision=("float32", "mixed_bfloat16", "mixed_float16"),
    on_save_error=("stop", "continue"),
    on_error=("raise", "skip"),
)
_LEAST = dict(
    seed=0, total_steps=1, batch=1, batch_eval=1, accum_steps=1, shuffle_buffer=1, warmup_steps=0, eval_every=0, progress_every=0,
    checkpoint_every=0, prefetch=0, grad_norm_clip=0, base_lr=0, label_smoothing=0, mixup=0, cutmix=0, erasing=0, weight_decay=0,
    layer_decay=0, ema=0, rho=0, rho_min=0, gsam_alpha=0, steps_on_device=1, keep_checkpoints=2, train_sample=0, linear_end=0,
    repeats=1, timescale=1, cooldown_steps=0, stochastic_depth_rate=0,
)  # fmt: skip
_MOST = dict(label_smoothing=1, erasing=1, layer_decay=1)
_BELOW = dict(ema=1, stochastic_depth_rate=1)
LOSSES = {
    "softmax": lambda smoothing: keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing),
    "sigmoid": lambda smoothing: SigmoidCrossEntropy(smoothing),
}
TWO_TOWERS = ("LiT",)  # families of models of images and texts
EXIT_PREEMPTED = 143  # 128 + SIGTERM, as a shell reports it


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` returns.

    Attributes:
        model: ends in probabilities.
        learner: the same layers, ending in logits.
        train, test: the `data.pipeline.Source`s.
        evaluation: a `classify.Evaluation` on all of the test split, a `masked.Judged` or a `contrastive.Judged`; None where the
            run was asked to end before its last step.
        seconds: training, from the first step to the last, compilation and evaluations included.
        place: the `strategy.Place` it was trained at.
        preempted_at: the step after which it was saved because it was asked to end, or None.
    """

    model: zoo.Model
    learner: keras.Model
    train: pipeline.Source
    test: pipeline.Source
    evaluation: classify.Evaluation | masked.Judged | contrastive.Judged | None
    seconds: float
    place: strategy.Place
    preempted_at: int | None = None

    @property
    def accuracy(self):
        """Of the evaluation; None where that is no classifier's."""
        return getattr(self.evaluation, "accuracy", None)


def check_config(config):
    """Checks every value that can be checked before anything is opened.

    Raises:
        errors.ConfigError: names the key, what it may be and what it is.
    """
    for key, allowed in _CHOICES.items():
        if config[key] not in allowed:
            raise errors.ConfigError(f"config.{key} must be one of {', '.join(map(repr, allowed))}, got {config[key]!r}.")
    types = [name for name, family in zoo.FAMILIES.items() if family.classifies and name != "Hybrid"]
    types = TWO_TOWERS if config.trainer == "contrastive" else types
    if config.model_type not in types:
        raise errors.ConfigError(f"config.model_type must be one of {', '.join(map(repr, types))}, got {config.model_type!r}.")
    for key, least in _LEAST.items():
        if config[key] is None or not config[key] >= least:
            raise errors.ConfigError(f"config.{key} must be at least {least}, got {config[key]}; pass --config.{key}=NUMBER.")
    for key, most in _MOST.items():
        if config[key] > most:
            raise errors.ConfigError(f"config.{key} must be at most {most}, got {config[key]}.")
    for key, limit in _BELOW.items():
        if config[key] >= limit:
            raise errors.ConfigError(f"config.{key} must be below {limit}, got {config[key]}.")
    if not config.dataset:
        raise errors.ConfigError("config.dataset is not set; pass --config.dataset= 'digits', a folder or a TFDS name.")
    if config.model is None or config.pp is None:
        raise errors.ConfigError("config.model or config.pp is not set; start from vit.py:MODEL,DATASET, augreg.py or digits.py.")
    _arguments(config)
    if config.position_stddev is not None and config.model_type == "Mixer":
        raise errors.ConfigError("config.position_stddev is for models with positions, which a Mixer has not; leave it out.")
    if config.batch % config.accum_steps:
        raise errors.ConfigError(
            f"config.batch must be a multiple of config.accum_steps, got {config.batch} and {config.accum_steps}; change either."
        )
    lr_rules(config)
    if config.randaugment and (len(config.randaugment) != 3 or augreg_level(config.augreg)[0]):
        raise errors.ConfigError(
            f"config.randaugment must be (operations, magnitude, deviation) or (), got {tuple(config.randaugment)}, without a "
            f"level of RandAugment beside it, got config.augreg={config.augreg!r}: these are two kinds of RandAugment."
        )
    _check_distillation(config)
    if config.trainer != "train":
        _check_masked(config)
    if config.trainer == "contrastive":
        _check_contrastive(config)
    if config.steps_on_device > 1:
        for key in ("total_steps", "eval_every", "progress_every", "checkpoint_every"):
            if config[key] % config.steps_on_device:
                raise errors.ConfigError(
                    f"config.{key} must be a multiple of config.steps_on_device, got {config[key]} and {config.steps_on_device}."
                )
    if config.remat and keras.config.backend() != "jax":
        used = [key for key, value in _arguments(config).items() if key.endswith(("dropout_rate", "depth_rate")) and value]
        if used or config.two_pass != "none":
            raise errors.ConfigError(
                f"config.remat on {keras.config.backend()} would draw other dropout masks when it computes a block again, and "
                f"takes one pass: set {', '.join(used) or 'config.two_pass'} to {'0' if used else 'none'}, or use "
                "KERAS_BACKEND=jax."
            )
    if config.warmup_steps >= config.total_steps:
        raise errors.ConfigError(
            f"config.warmup_steps must be less than config.total_steps, got {config.warmup_steps} and {config.total_steps}; "
            "pass a smaller --config.warmup_steps."
        )


def _check_distillation(config):
    given = config.distillation
    try:
        objectives.check_distillation(given.type, given.tau, given.alpha)
    except errors.ArgumentError as error:
        raise errors.ConfigError(f"config.distillation: {error}") from error
    if given.type != "none" and not given.teacher:
        raise errors.ConfigError(
            f"config.distillation.type={given.type!r} needs a teacher: pass --config.distillation.teacher= VARIANT:WEIGHTS, a "
            ".keras file or the folder of a TF-Hub module."
        )
    mixing = max(config.mixup, config.cutmix, augreg_level(config.augreg)[2])
    if given.type != "none" and given.cache and mixing:
        raise errors.ConfigError(
            "config.distillation.cache keeps the teacher's logits of single images, which Mixup and CutMix mix: set "
            "config.mixup, config.cutmix and config.augreg to none of them, or leave the cache out."
        )


def _find_teachers(config):
    """Refuses a teacher or a tokenizer that is not there."""
    words = {"distillation.teacher": config.distillation.teacher if config.distillation.type != "none" else ""}
    if config.trainer == "masked":
        words["masked.tokenizer"] = config.masked.tokenizer.removeprefix("pixels")
    for key, word in words.items():
        try:
            if word:
                teachers.find(word)
        except errors.ArgumentError as error:
            raise errors.ConfigError(f"config.{key}: {error}") from error


def _arguments(config):
    """The builder's keywords; none where the model is no registered one."""
    return {} if config.trainer == "tokenizer" else models.arguments(config)


def _check_masked(config):
    try:
        if config.trainer == "masked":
            masked.Mask(config.masked.ratio, config.masked.least)
    except errors.ArgumentError as error:
        raise errors.ConfigError(f"config.masked: {error}") from error
    if config.distillation.type != "none" or config.mixup or config.cutmix or augreg_level(config.augreg)[2]:
        raise errors.ConfigError(
            f"config.trainer={config.trainer!r} knows no labels: set config.distillation.type to 'none', config.mixup and "
            "cutmix to 0 and config.augreg to a level without Mixup."
        )


def _check_contrastive(config):
    given = config.contrastive
    try:
        contrastive.check_towers(given.towers)
        contrastive.check_parts(config.accum_steps)
    except errors.ArgumentError as error:
        raise errors.ConfigError(f"config.contrastive: {error}") from error
    if given.duplicates not in contrastive.DUPLICATES:
        raise errors.ConfigError(
            f"config.contrastive.duplicates must be one of {', '.join(contrastive.DUPLICATES)}, got {given.duplicates!r}."
        )
    for tower, letter in zip(("image", "text"), given.towers):
        start = config.pretrained_dir or given[f"{tower}_weights"]
        if (letter == "u") == bool(start):
            raise errors.ConfigError(
                f"config.contrastive.towers={given.towers!r}: the {tower} tower {'has' if start else 'lacks'} weights to start "
                f"from ({start!r}); 'u' is for a tower without, 'U' or 'L' for one with config.pretrained_dir, a file of both "
                f"towers, or config.contrastive.{tower}_weights, a file of one."
            )
    if config.loss == "sigmoid" and config.model.get("bias") is None:
        raise errors.ConfigError("config.loss='sigmoid' needs a model with a bias: set config.model.bias, such as to -10.0.")
    if config.layer_decay != 1 or config.label_smoothing:
        raise errors.ConfigError(
            "config.trainer='contrastive' knows no layer_decay and no label_smoothing: set them to 1 and 0, and learning rates "
            "of layers by config.lr_rules."
        )


def lr_rules(config):
    """The (pattern, factor) of `config.lr_rules`.

    Raises:
        errors.ConfigError: one is no 'PATTERN=FACTOR'.
    """
    rules = []
    for rule in config.lr_rules:
        pattern, _, factor = str(rule).rpartition("=")
        try:
            rules.append((pattern, float(factor)))
        except ValueError:
            pattern = ""
        if not pattern or rules[-1][1] < 0:
            raise errors.ConfigError(f"config.lr_rules: expected 'PATTERN=FACTOR' such as 'block_0/*=0.1', got {rule!r}.")
    return rules


def check_workdir(workdir):
    """Refuses a folder that holds the results of something else, which a run would replace.

    Raises:
        errors.ConfigError: it does, or it is not a folder.
    """
    workdir = Path(workdir)
    found = [name for name in RESULTS if (workdir / name).exists()]
    if (found and not (workdir / "checkpoints").is_dir()) or (workdir.exists() and not workdir.is_dir()):
        raise errors.ConfigError(
            f"--workdir={workdir} must be a new folder or that of a run to go on with, but {', '.join(found) or 'a file'} is "
            "there and no checkpoints: choose another folder or move that away."
        )


def pretrained_file(config):
    """The checkpoint that training starts from, a path or URL; None for random weights.

    Raises:
        errors.ConfigError: a local folder does not have it; errors.ArgumentError: there is no AugReg model of that name.
    """
    if not config.pretrained_dir:
        return None
    if files.ending(config.pretrained_dir):
        path = os.path.expanduser(config.pretrained_dir)
        if "://" not in path and not os.path.isfile(path):
            raise errors.ConfigError(f"{path}: there is no such checkpoint; check --config.pretrained_dir.")
        return path
    name = config.model_or_filename or config.model.model_name
    if config.model_or_filename and "-" not in name:
        name = keras_vit.augreg.recommended(name)
    path = f"{config.pretrained_dir.rstrip('/')}/{name.removesuffix('.npz')}.npz"
    if "://" not in path and not os.path.isfile(os.path.expanduser(path)):
        bucket = "mixer_models" if config.model_type == "Mixer" else "vit_models"
        published = f"gs://{bucket}/{'augreg' if config.model_or_filename else 'imagenet21k'}"
        raise errors.ConfigError(
            f"{path}: there is no such checkpoint. Download it from {published}, or pass --config.pretrained_dir={published}, or "
            "--config.pretrained_dir= for random weights."
        )
    return path


def build_model(config, classes):
    """The model of `config.model` with a new head, and its pretrained weights, on `config.pp.crop` pixels."""
    path = pretrained_file(config)
    shape = (config.pp.crop, config.pp.crop, 3)
    build, arguments = getattr(keras_vit, models.family(config)), _arguments(config)
    with _rematted(config, arguments["depth"]):
        model = build(
            classes=classes, input_shape=shape, classifier_activation=config.loss, name=config.model.model_name, **arguments
        )
    if path:
        dropped = () if config.model.get("representation_size") else ("pre_logits/*",)
        zoo.load_weights(model, path, ignore=dropped, reset_head=True)
    elif config.position_stddev is not None:
        positions = model.get_layer("tokens").positions
        positions.assign(keras.random.normal(positions.shape, stddev=config.position_stddev, seed=config.seed))
    for bias in (layer.bias for layer in model.layers if layer.name in zoo.HEADS):
        bias.assign(keras.ops.full(bias.shape, config.head_bias))
    return model


def _rematted(config, depth):
    """In which blocks are built as `config.remat` says."""
    blocks = [f"block_{i}" for i in range(depth)]
    return keras.RematScope("list_of_layers", layer_names=blocks) if config.remat else contextlib.nullcontext()


def build_towers(config):
    """The model of `config.model` with two towers, and what pretrained weights it starts from, on `config.pp.crop` pixels.

    Raises:
        errors.ConfigError: it has no vocabulary; errors.KerasViTError: a file does not fit.
    """
    build, arguments, given = getattr(keras_vit, models.family(config)), _arguments(config), config.contrastive
    shape = (config.pp.crop, config.pp.crop, 3)
    with _rematted(config, max(arguments["depth"], arguments["text_depth"])):
        model = build(weights=config.pretrained_dir or None, input_shape=shape, name=config.model.model_name, **arguments)
    if model.tokenizer is None:
        raise errors.ConfigError(
            "config.model.vocabulary is not set: pass --config.model.vocabulary= the path or URL of the text tower's vocabulary."
        )
    if given.image_weights:
        _start_image_tower(model, given.image_weights, shape, arguments)
    if given.text_weights:
        zoo.load_weights(model.text_tower, given.text_weights)
    if config.position_stddev is not None and not (config.pretrained_dir or given.image_weights):
        positions = model.image_tower.get_layer("tokens").positions
        positions.assign(keras.random.normal(positions.shape, stddev=config.position_stddev, seed=config.seed))
    return model


def _start_image_tower(model, path, shape, arguments):
    """Gives the image tower the weights of a file: of a LiT, or of a ViT, whose head is left out."""
    if zoo.identify(files.open_file(fetch.fetch(path).path)).family in TWO_TOWERS:
        zoo.load_weights(model.image_tower, path)
        return
    sizes = {key: arguments[key] for key in ("patch_size", "width", "depth", "heads", "mlp")}
    reads = arguments.get("classifier", "token")
    start = keras_vit.ViT(False, None, input_shape=shape, classifier=reads, representation_size=None, **sizes)
    zoo.load_weights(start, path, ignore=("head/*", "pre_logits/*"))
    own = load.named_weights(model.image_tower)
    for name, weight in load.named_weights(start).items():
        own[name].assign(weight)


def build_learner(config, model, teacher=None, graph=None):
    """What is fitted: `model` up to its logits, compiled with the optimizer and the loss of `config`; and the schedule.

    Args:
        teacher: an `objectives.Teacher`; None without one, and where its logits come with the batches.
        graph: None, or a model that ends in the loss of each image, which is fitted in place of `model`.
    """
    schedule = WarmupDecay(
        config.total_steps, config.base_lr, config.decay_type, config.warmup_steps, config.linear_end, config.timescale,
        config.cooldown_steps,
    )  # fmt: skip
    rules = lr_rules(config)
    if config.layer_decay != 1:
        rules += optimizers.layerwise_decay(model, config.layer_decay)
    common = dict(rules=rules, weight_decay=config.weight_decay, decay_scale="schedule")
    if config.ema:
        common |= dict(use_ema=True, ema_momentum=config.ema)
    if config.optimizer == "sgd":
        optimizer = optimizers.MomentumSGD(schedule, trace_dtype=config.optim_dtype, **common)
    elif config.optimizer == "adamw":
        optimizer = optimizers.AdamW(schedule, moment_dtype=config.optim_dtype, **common)
    else:
        optimizer = optimizers.Adafactor(schedule, dtype_momentum=config.optim_dtype, **common)
    least = config.linear_end if config.decay_type == "linear" else 0.0
    two_pass = {
        "none": None,
        "sam": SAM(config.rho) if config.two_pass == "sam" else None,
        "gsam": GSAM(config.rho, config.rho_min, config.gsam_alpha, config.base_lr, least) if config.two_pass == "gsam" else None,
    }[config.two_pass]
    given, objective, loss = config.distillation, None, LOSSES[config.loss](config.label_smoothing)
    if graph is not None:
        inputs, outputs, objective, loss = graph.inputs, graph.outputs, objectives.Outputs(graph), None
    else:
        inputs, outputs = model.inputs, zoo.logits(model)
        if given.type != "none" or any(layer.name == "head_distillation" for layer in model.layers):
            objective = objectives.Distillation.of(model, given.type, given.tau, given.alpha, teacher)
    learner = Learner(
        inputs, outputs, parts=config.accum_steps, clip_norm=config.grad_norm_clip, two_pass=two_pass,
        objective=objective, steps_on_device=config.steps_on_device,
    )  # fmt: skip
    learner.compile(optimizer, loss)
    learner.optimizer.build(learner.trainable_variables)
    return learner, schedule


def _sources(config):
    def source(split):
        common = dict(data_dir=config.tfds_data_dir, manual_dir=config.tfds_manual_dir, on_error=config.on_error)
        if config.trainer != "contrastive":
            return pipeline.open_source(config.dataset, split, **common)
        given = config.contrastive
        said = dict(text=given.text, prompts=tuple(given.prompts), class_names=tuple(given.class_names) or None)
        return captions.open_captions(config.dataset, split, **said, **common)

    return source(config.pp.train), source(config.pp.test)


def _train_batches(config, source, pixels, start=0, shard=(0, 1), **more):
    """The batches from step `start` on: one worker's slices of them."""
    layers, magnitude, mixup = augreg_level(config.augreg)
    batches = pipeline.train_batches(
        source, size=config.pp.crop, batch=config.batch, pixels=pixels, seed=config.seed, shuffle_buffer=config.shuffle_buffer,
        augment=config.augment == "crop_flip", prefetch=config.prefetch, start=start * config.batch, shard=shard,
        randaugment=(layers, magnitude) if layers else None, repeats=config.repeats,
        increasing=tuple(config.randaugment) or None, mixup=max(mixup, config.mixup), cutmix=config.cutmix,
        erasing=config.erasing, **more,
    )  # fmt: skip
    if config.augment == "shift":
        return shifted(batches, config.seed, start * config.batch, shard)
    return batches


def _test_batches(config, source, pixels, batch):
    return pipeline.eval_batches(source, size=config.pp.crop, batch=batch, pixels=pixels, prefetch=config.prefetch)


def train(config, workdir):
    """Trains and evaluates as `config` says; stores model.keras, model.npz and the whole state in `workdir`.

    In a folder where it did so before it goes on from the newest checkpoint that is whole, to the same bits as if it had never
    stopped.

    Args:
        config: of a file in `keras_vit/configs`.
        workdir: folder, made if needed, once data, model and pretrained weights are in order.

    Returns:
        A `Trained`.

    Raises:
        errors.KerasViTError: the configuration, data, checkpoint or folder cannot be used; a number is not finite.
    """
    workdir = Path(workdir)
    check_config(config)
    check_workdir(workdir)
    if config.trainer != "contrastive":
        pretrained_file(config)  # before data are fetched
    _find_teachers(config)
    place = strategy.open_strategy(config.strategy, model_axis=config.model_axis)
    place.check_precision(config.precision)
    place.check_batch(config.batch, config.accum_steps)
    sizes = {key: size for key, size in _arguments(config).items() if key.endswith(("heads", "mlp"))}
    place.check_sizes(**{key: size for key, size in sizes.items() if isinstance(size, int)})
    profile = callbacks.profile_steps(config.profile, config.total_steps)
    keras.utils.set_random_seed(config.seed)
    training, test = _sources(config)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.precision)
    try:
        with place.scope():
            task = _TASKS[config.trainer](config, training, test)
        about = state.described(config, data=training.fingerprint(), **task.about)
        with place.guarded(workdir):
            if not place.same(zlib.crc32(json.dumps(about, sort_keys=True).encode()) >> 1):
                raise errors.ConfigError(
                    "the workers have different configurations, data, teachers or versions; start all with the same command and "
                    "installation."
                )
        with place.guarded(workdir), place.scope():
            model = task.model()
            learner, schedule = task.learner(model)
    finally:
        keras.config.set_dtype_policy(before)
    task.prepare(place)
    _make(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_written(workdir))
        stack.enter_context(place.guarded(workdir))
        if place.chief:
            stack.enter_context(state.lock(workdir))
        checkpoints = place.checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.on_save_error)
        if place.workers == 1:  # otherwise it might wait for a worker that is lost
            stack.enter_context(_settled(checkpoints))
        start = _resume(checkpoints, place, learner, about, config, training)
        journal = stack.enter_context(callbacks.Journal(workdir, start)) if place.chief else callbacks.Silent()
        metrics = stack.enter_context(Metrics(workdir / "metrics.jsonl", start)) if place.chief else None
        preemption = stack.enter_context(state.Preemption())
        journal.line(
            f"{model.name}: {model.count_params():,} parameters. {config.dataset}: {_count(training)} images to train on, "
            f"{_count(test)} to test, {test.num_classes or 'no'} classes. {config.total_steps} steps of {config.batch} images; "
            f"{place.name}, {place.replicas} replica{'s' if place.replicas > 1 else ''}, {config.precision}."
        )
        if start:
            damaged = ", ".join(sorted(path.name for path in checkpoints.folder.glob("*.corrupt*")))
            aside = f" Damaged ones lie aside: {damaged}." if damaged else ""
            journal.line(f"Going on after step {start}, from {checkpoints.path(start)}.{aside}")
        pixels = Pixels.from_dict(model.weights_info["preprocessing"])
        try:
            if start < config.total_steps:
                first = pipeline.probe(_train_batches(config, training, pixels, start), training)
                journal.images(start, callbacks.viewable(first[0][:16], pixels))
                for note in task.notes(first[1]):
                    journal.line(note)
            todo = finetune.Run(
                total_steps=config.total_steps, batch=config.batch, schedule=schedule, journal=journal, metrics=metrics,
                store=lambda: task.store(model, workdir), checkpoints=checkpoints, about=about, start=start,
                preemption=preemption, blame=lambda step: _blame(config, training, step), place=place,
                progress_every=config.progress_every, eval_every=config.eval_every, checkpoint_every=config.checkpoint_every,
                steps_on_device=config.steps_on_device, profile=profile, multi_label=config.loss == "sigmoid", judge=task.judge,
            )  # fmt: skip
            batches = place.batches(lambda *shard: task.batches(pixels, start, shard), config.batch)
            with place.guarded(workdir):
                outcome = finetune.finetune(learner, batches, task.tests(pixels), todo)
        except tf.errors.OpError as error:
            pipeline.raise_unreadable(error, training, test)
        if outcome.preempted_at is not None:
            journal.line(f"Asked to end: saved after step {outcome.preempted_at}. The same command goes on from there.")
        else:
            if config.train_sample and not task.judge:
                sample = _test_batches(
                    config, training_sample(training, config.train_sample, config.seed), pixels, config.batch_eval
                )
                share = classify.accuracy(learner, sample)
                journal.line(f"Accuracy on {config.train_sample} training images, as the test images are prepared: {share:.4f}")
                if metrics:
                    metrics.write(config.total_steps, accuracy_train=share)
            journal.line(f"Trained for {outcome.seconds:.1f} s; stored {workdir / 'model.keras'}.")
        place.close()
    return Trained(model, learner, training, test, outcome.evaluation, outcome.seconds, place, outcome.preempted_at)


class _Classifier:
    """What a run trains, on which batches, and how it is judged: a classifier, with or without a teacher.

    Attributes:
        about: what a checkpoint says of it besides configuration and data.
        judge: of `finetune.Run`.
    """

    judge = None

    def __init__(self, config, training, test):
        self.config, self.training, self.test = config, training, test
        self.teacher = self.targets = None
        given = config.distillation
        if given.type != "none":
            self.teacher = teachers.open_teacher(given.teacher)
            self.teacher.check(training.num_classes, f"config.dataset={config.dataset!r}")
        self.about = {"teacher": self.teacher.digest()} if self.teacher else {}

    def model(self):
        return build_model(self.config, self.training.num_classes)

    def learner(self, model):
        """(what is fitted, its schedule)."""
        return build_learner(self.config, model, None if self.config.distillation.cache else self.teacher)

    def prepare(self, place):
        """Whatever takes time, once the rest is known to be in order."""
        path = self.config.distillation.cache
        if not self.teacher or not path:
            return
        _check_cache(place, "distillation", path)
        self.targets = self.teacher.cached(self.training, path, self.config.batch_eval)

    def batches(self, pixels, start, shard):
        return _train_batches(self.config, self.training, pixels, start, shard, targets=self.targets)

    def tests(self, pixels):
        return _test_batches(self.config, self.test, pixels, self.config.batch_eval)

    def notes(self, labels):
        """Lines for the log about the data and the labels of the first batch."""
        return ()

    def store(self, model, workdir):
        """Writes what people take away."""
        _store_keras(model, workdir)
        zoo.save_npz(model, workdir / "model.npz")


class _Masked(_Classifier):
    """A model that guesses hidden patches; labels are not looked at."""

    judge = staticmethod(masked.judge)

    def __init__(self, config, training, test):
        super().__init__(config, training, test)
        given = config.masked
        self.mask, self.guessed = masked.Mask(given.ratio, given.least), masked.PixelTargets()
        if given.tokenizer != "pixels":
            found = teachers.open_teacher(given.tokenizer)
            self.guessed = masked.CodeTargets(found.model, found.name, found.pixels)
            self.about = {"tokenizer": found.digest()}

    def learner(self, model):
        model.remember(weights_info={**model.weights_info, "zero_head": True})
        self.grid = masked.grid_of(model)
        self.mask.count(self.grid)
        return build_learner(self.config, model, graph=masked.rewired(model, self.guessed))

    def prepare(self, place):
        pass

    def batches(self, pixels, start, shard):
        config, first = self.config, start * self.config.batch
        batches = super().batches(pixels, start, shard)
        return masked.masked(batches, config.batch, self.grid, self.mask, config.seed, first, shard)

    def tests(self, pixels):
        return masked.masked(super().tests(pixels), self.config.batch_eval, self.grid, self.mask, self.config.seed)


class _Tokenizer(_Classifier):
    """A model that gives patches codes, learned by bringing back the images from them."""

    judge = staticmethod(masked.judge)

    def model(self):
        given, side = self.config.dvae, self.config.pp.crop
        return dvae.encoder((side, side, 3), given.patch_size, given.vocabulary, given.width, given.depth)

    def learner(self, model):
        config = self.config
        steps = config.total_steps * config.accum_steps
        graph = dvae.autoencoder(model, steps, divergence=config.dvae.divergence, seed=config.seed)
        return build_learner(config, model, graph=graph)

    def store(self, model, workdir):
        _store_keras(model, workdir)


class _Contrastive(_Classifier):
    """Two towers that learn which image and which caption belong together."""

    def __init__(self, config, training, test):
        super().__init__(config, training, test)
        given = config.contrastive
        self.built, self.embedded = build_towers(config), None
        towers = zip(("image", "text"), (self.built.image_tower, self.built.text_tower), given.towers)
        self.locked = {name: contrastive.backbone(tower) for name, tower, letter in towers if letter == "L"}
        pixels = zoo.pixels_of(self.built)
        self.teachers = {name: objectives.Teacher(model, f"{name} tower", pixels) for name, model in self.locked.items()}
        self.about = {f"{name}_tower": teacher.digest() for name, teacher in self.teachers.items()}
        plain = config.augment == "none" and not (augreg_level(config.augreg)[0] or config.randaugment or config.erasing)
        self.embeds = plain and "image" in self.locked

    def model(self):
        return self.built

    def learner(self, model):
        given = self.config.contrastive
        graph = contrastive.paired(model, given.towers, self.config.loss, given.duplicates, self.embeds)
        return build_learner(self.config, model, graph=graph)

    def prepare(self, place):
        config, tests = self.config, None
        if self.embeds:
            path = config.contrastive.cache
            _check_cache(place, "contrastive", path)
            self.embedded = self.teachers["image"].cached(self.training, path, config.batch_eval)
        if "image" in self.locked:
            tests = self.teachers["image"].cached(self.test, None, config.batch_eval)
            tests = np.delete(tests, [number for number in getattr(self.test, "dropped", ()) if number < len(tests)], 0)
        self.judge = contrastive.Judge(
            self.built, config.batch, config.loss, config.contrastive.duplicates, self.test.sentences, tests
        )

    def batches(self, pixels, start, shard):
        batches = _train_batches(self.config, self.training, pixels, start, shard, embeddings=self.embedded)
        return contrastive.tokenized(batches, self.built.tokenizer)

    def tests(self, pixels):
        if self.judge.embedded is None:
            return super().tests(pixels)
        return captions.texts(self.test, self.config.batch_eval)

    def notes(self, labels):
        for source in (self.training, self.test):
            yield from (f"{source.dataset} ({source.split}): {note}." for note in source.notes)
        several = len(labels) - len(set(labels))
        if several:
            taken = {"negative": "wrong for each other", "positive": "right for each other"}[self.config.contrastive.duplicates]
            yield f"{several} of the {len(labels)} captions of the first batch are those of another image: taken as {taken}."

    def store(self, model, workdir):
        for locked in self.locked.values():  # only here: who loads it may train it
            locked.trainable = True
        super().store(model, workdir)
        for locked in self.locked.values():
            locked.trainable = False


_TASKS = {"train": _Classifier, "masked": _Masked, "tokenizer": _Tokenizer, "contrastive": _Contrastive}


def _check_cache(place, key, path):
    if path and place.workers > 1 and not os.path.exists(path):
        raise errors.ConfigError(
            f"config.{key}.cache={path} is not there, and several workers cannot make it: run one step on one first."
        )


@contextlib.contextmanager
def _written(workdir):
    """Makes of a disk that is full or fails the error that users see."""
    try:
        yield
    except errors.KerasViTError:
        raise
    except (OSError, tf.errors.ResourceExhaustedError) as error:
        if isinstance(error, tf.errors.OpError) and "No space left" not in error.message:  # but in memory
            raise
        raise errors.CacheError(
            f"{workdir}: a file could not be read or written: {error}. Checkpoints are as they were. Make room or mend rights; "
            "the same command goes on from the newest."
        ) from error


@contextlib.contextmanager
def _settled(checkpoints):
    """Leaves no save under way where a run ends by an error."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what ended the run is what is told
            checkpoints.wait()
        raise


def _make(workdir):
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ConfigError(f"--workdir={workdir} cannot be made ({error.strerror}); choose another folder.") from error


def _resume(checkpoints, place, learner, about, config, source):
    """Puts the newest whole checkpoint into the learner; returns its step, 0 if there is none."""
    found = place.latest(checkpoints, learner)
    if found is None:
        return 0
    step, arrays, then = found
    allowed = [name.strip() for names in config.allow_change for name in names.split(",")]
    if "data" not in allowed:
        source.check(then["data"])
    state.check_config(then, about, allow_change=allowed)
    state.restore(learner, arrays)
    return step


def _blame(config, source, step):
    """Names the examples of the batch that follows so many steps."""
    examples = pipeline.positions(
        source, seed=config.seed, start=step * config.batch, count=config.batch, shuffle_buffer=config.shuffle_buffer,
        repeats=config.repeats, batch=config.batch,
    )  # fmt: skip
    names = [example.path or str(example.index) for example in examples]
    return f"examples {', '.join(names[:_BLAMED])}" + (f" and {len(names) - _BLAMED} more" if len(names) > _BLAMED else "")


def _count(source):
    return "an unknown number of" if source.num_examples is None else f"{source.num_examples:,}"


def _store_keras(model, workdir):
    with files.replacing(workdir / "model.keras") as temporary:
        model.save(temporary)


def export(config, trained, workdir):
    """Exports `workdir/module`, loads it in another process through `hub.KerasLayer` and evaluates the whole test split there.

    Returns:
        (accuracy of the module, largest difference of its logits from the model's).

    Raises:
        errors.ExportError: it cannot be exported or loaded, or its logits differ by more than 1e-5, or by more than 1e-5 of the
            largest where that is above 1.
    """
    path, side = Path(workdir) / "module", config.pp.crop
    model = trained.model
    if trained.place.name != "one_device":  # whose variables are those of its strategy
        if keras.config.backend() == "jax":
            keras.distribution.set_distribution(None)
        model = keras.saving.load_model(Path(workdir) / "model.keras")
    hub.export(model, path)
    size = min(trained.test.num_examples or _CHUNK, max(1, _CHUNK // (side * side * 3)))  # tf.data allocates whole batches
    pixels = Pixels.from_dict(trained.model.weights_info["preprocessing"])
    model = keras.Model(model.inputs, zoo.logits(model))
    model.compile(jit_compile=keras.config.backend() == "jax")  # as the module runs: XLA sums in another order
    right = count = 0
    difference = largest = 0.0
    for images, labels in _test_batches(config, trained.test, dataclasses.replace(pixels, **UNIT), size):
        images = np.asarray(images)
        logits = hub.check(path, images)["keras_layer"]
        expected = model.predict(pixels.normalize(images * np.float32(255)), batch_size=_BATCH, verbose=0)
        difference = max(difference, float(np.max(np.abs(logits - expected))))
        largest = max(largest, float(np.max(np.abs(expected))))
        right += int(np.sum(np.argmax(logits, -1) == np.argmax(labels, -1)))
        count += len(logits)
    if not difference <= MODULE_TOLERANCE * max(1.0, largest):
        raise errors.ExportError(
            f"{path}: expected the module's logits on the test split within {MODULE_TOLERANCE:g} of the model's, whose largest "
            f"is {largest:.1f}, got a difference of {difference:.1e}. Do not use it; model.keras and model.npz are intact."
        )
    return right / count, difference


def run(config, workdir, command=None):
    """The whole job: `train`, a report, then `export` unless `config.export` is false. Or `inference_time`, where the trainer is.

    Args:
        config, workdir: of `train`.
        command: a shell's line that repeats the run, for the report.

    Returns:
        The test accuracy of what came out last; None where the run was asked to end and saved. The test loss of what knows
        no labels, images per second of `inference_time`.
    """
    if config.trainer == "inference_time" and "initial_steps" in config:
        return inference_time(config, workdir)
    trained = train(config, workdir)
    if config.trainer != "train":
        return trained.evaluation and trained.evaluation.loss
    if trained.preempted_at is not None or not trained.place.chief:
        return trained.accuracy
    _report(config, workdir, trained, command or "python -m keras_vit.main")
    if not config.export:
        return trained.accuracy
    print(f"Exporting {Path(workdir) / 'module'} and evaluating it in another process ...", flush=True)
    share, difference = export(config, trained, workdir)
    with callbacks.Journal(workdir) as journal:
        journal.line(
            f"{Path(workdir) / 'module'} in another process through hub.KerasLayer: test accuracy {share:.4f}, "
            f"maximum difference {difference:.1e}"
        )
    return share


def inference_time(config, workdir):
    """Measures a model with random weights on one device, as the original's inference_time.py.

    Writes `imgs_sec_core_min`, `_max`, `_mean` and `_std` as scalars of step 0, and one line.

    Args:
        config: of configs/inference_time.py.
        workdir: folder, made if needed.

    Returns:
        The mean images per second.

    Raises:
        errors.KerasViTError: a value cannot be used.
    """
    for key, least in dict(steps=1, initial_steps=0, batch=1, num_classes=1, image_size=0).items():
        if config[key] < least:
            raise errors.ConfigError(f"config.{key} must be at least {least}, got {config[key]}; pass --config.{key}=NUMBER.")
    if config.precision not in _CHOICES["precision"]:
        raise errors.ConfigError(f"config.precision must be one of {', '.join(_CHOICES['precision'])}, got {config.precision!r}.")
    row = models.find_row(config.model_name, zoo.VARIANTS | models.rows())
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.precision)
    try:
        shape = dict(input_shape=(config.image_size, config.image_size, 3)) if config.image_size else {}
        model = row.build(weights=None, classes=config.num_classes, **shape)
    finally:
        keras.config.set_dtype_policy(before)
    _make(workdir)
    rates = speed.images_per_second(model, config.batch, config.steps, config.initial_steps)
    found = {name: float(getattr(rates, name)()) for name in ("min", "max", "mean", "std")}
    with callbacks.Journal(workdir) as journal:
        journal.scalars(0, **{f"imgs_sec_core_{name}": value for name, value in found.items()})
        low, high, mean, deviation = (f"{value:.2f}" for value in found.values())
        journal.line(
            f"{row.name}: {mean} img/s/core (min {low}, max {high}, std {deviation}), "
            f"{config.steps} batches of {config.batch} at {' x '.join(map(str, model.input_shape[1:3]))}, {config.precision}, on "
            f"{keras.config.backend()}."
        )
    return found["mean"]


def _report(config, workdir, trained, command):
    """Writes `workdir/report.md`."""
    devices = keras.distribution.list_devices() if keras.config.backend() != "torch" else ["cpu"]
    worst = {index: None for index, *_ in trained.evaluation.worst}
    for number, (_, example) in enumerate(trained.test.ordered() if worst else ()):
        if number in worst:
            content, _ = trained.test.read(example)
            worst[number] = (pipeline.decode(content) if content.dtype == tf.string else content).numpy()
    path = report.write(
        Path(workdir),
        report.About(
            config=config, model=trained.model.name, parameters=trained.model.count_params(), strategy=trained.place.name,
            devices=tuple(devices), precision=config.precision, command=command, train_images=trained.train.num_examples,
            test_images=trained.test.num_examples, class_names=trained.test.class_names, evaluation=trained.evaluation,
            mistakes=tuple(worst.values()),
        ),
    )  # fmt: skip
    print(f"Wrote {path}.", flush=True)


def _config_path(value):
    """`NAME.py[:ARGUMENT]` with the file where it is, or of that name among the configurations of this package."""
    file, colon, argument = value.partition(":")
    own = {path.name: path for path in sorted(CONFIGS.glob("*.py")) if path.stem not in ("__init__", "common", "models")}
    if not os.path.isfile(file):
        name = Path(file).with_suffix(".py").name if file else ""
        if name not in own:
            raise errors.ConfigError(f"--config={value}: there is no file {file!r}; this package has {', '.join(own)}.")
        file = str(own[name])
    return file + colon + argument


def _keys(config, prefix=""):
    for key in config:
        yield prefix + key
        if isinstance(config.get(key), ConfigDict):
            yield from _keys(config[key], f"{prefix}{key}.")


def _check_keys(config, argv):
    known = list(_keys(config))
    for argument in argv:
        found = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if found and found[1] not in known:
            near = difflib.get_close_matches(found[1], known, 3) or known
            raise errors.ConfigError(f"{argument}: the configuration has no key {found[1]!r}; nearest: {', '.join(near)}.")


def parse(argv):
    """(config, workdir) of a command line.

    Raises:
        errors.ConfigError: one line that says what is wrong with it.
    """
    argv = list(argv)
    named = [i for i, argument in enumerate(argv) if re.match(r"--?config(=|$)", argument)]
    if not named:
        argv.insert(1, f"--config={CONFIGS / 'digits.py'}")
    else:
        at = named[-1]
        option, _, value = argv[at].partition("=")
        if not value:
            value = argv.pop(at + 1) if at + 1 < len(argv) else ""
        argv[at] = f"{option}={_config_path(value)}"
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder for logs and results.", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "Configuration file.", values, lock_config=True, sys_argv=argv)
    path = next(argument for argument in reversed(argv) if re.match(r"--?config=", argument)).partition("=")[2]
    try:
        _check_keys(config_flags.ConfigFileFlagParser("config").parse(path), argv)
        rest = values(argv)[1:]
    except errors.ConfigError as error:
        original = error.__context__  # config_flags raises it again with a traceback as its text
        raise (original if isinstance(original, errors.ConfigError) else error) from None
    except flags.Error as error:
        raise errors.ConfigError(f"{error}; see --help.") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError, SyntaxError) as error:
        raise errors.ConfigError(f"--config={path}: {str(error).strip().splitlines()[-1]}; mend that file.") from error
    if rest:
        raise errors.ConfigError(f"expected options only, got {' '.join(rest)}; write --config.KEY=VALUE.")
    if not values.workdir:
        raise errors.ConfigError("--workdir=DIR is needed: the folder for logs and results.")
    return values.config, values.workdir


def main(argv):
    """The console command. Returns the exit status; mistakes are one message on stderr."""
    if {"--help", "-h", "--helpfull"} & set(argv[1:]):
        print(__doc__)
        return 0
    if keras.config.backend() != "tensorflow":  # tf.data needs the CPU only; the memory of the others is the backend's
        tf.config.set_visible_devices([], "GPU")
    try:
        config, workdir = parse(argv)
        if run(config, workdir, shlex.join(["python", "-m", "keras_vit.main", *argv[1:]])) is None:
            return EXIT_PREEMPTED
    except errors.KerasViTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
