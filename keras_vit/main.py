r"""Fine-tunes, evaluates and exports one model: the main job.

python -m keras_vit.main --workdir=runs/digits
python -m keras_vit.main --workdir=runs/cifar10 --config=keras_vit/configs/vit.py:b16,cifar10 \
    --config.pretrained_dir=gs://vit_models/imagenet21k --config.batch=256

--config is a file, or the name of one in keras_vit/configs (vit.py:b16,cifar10); without it, digits.py. Every key is described in
configs/common.py and set by --config.KEY=VALUE. In --workdir it leaves

    model.keras   the model, scores out: keras.saving.load_model after `import keras_vit`
    model.npz     its weights in the original's layout
    module/       the TF-Hub module: RGB in [0, 1] in, logits out
    train.log, events.out.tfevents.*   what was printed, and TensorBoard scalars
"""

import dataclasses
import difflib
import os
import re
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

import keras_vit
from keras_vit import errors, hub, zoo
from keras_vit.checkpoints import files
from keras_vit.configs import models
from keras_vit.data import pipeline
from keras_vit.data.pixels import Pixels
from keras_vit.training import finetune
from keras_vit.training.augment import shifted
from keras_vit.training.callbacks import Journal
from keras_vit.training.optimizers import TRACE_DTYPES, MomentumSGD
from keras_vit.training.schedules import DECAYS, WarmupDecay

CONFIGS = Path(__file__).parent / "configs"
RESULTS = ("model.keras", "model.npz", "module")
UNIT = Pixels(mean=(0.0,) * 3, std=(255.0,) * 3)  # what an exported module takes
MODULE_TOLERANCE = 1e-5
_CHUNK = 2**28  # numbers in the images sent to the other process at once: 1 GiB

_CHOICES = dict(
    trainer=("train",),
    model_type=("ViT", "Mixer"),
    augment=("crop_flip", "shift", "none"),
    decay_type=DECAYS,
    optim_dtype=TRACE_DTYPES,
)
_LEAST = dict(
    seed=0, total_steps=1, batch=1, batch_eval=1, accum_steps=1, shuffle_buffer=1, warmup_steps=0, eval_every=0, progress_every=0,
    checkpoint_every=0, prefetch=0, grad_norm_clip=0, base_lr=0, label_smoothing=0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` returns.

    Attributes:
        model: ends in probabilities.
        learner: the same layers, ending in logits.
        test: the `data.pipeline.Source` it was evaluated on.
        accuracy: on all of it.
        seconds: training, from the first step to the last, compilation and evaluations included.
    """

    model: zoo.Model
    learner: keras.Model
    test: pipeline.Source
    accuracy: float
    seconds: float


def check_config(config):
    """Checks every value that can be checked before anything is opened.

    Raises:
        errors.ConfigError: names the key, what it may be and what it is.
    """
    for key, allowed in _CHOICES.items():
        if config[key] not in allowed:
            raise errors.ConfigError(f"config.{key} must be one of {', '.join(map(repr, allowed))}, got {config[key]!r}.")
    for key, least in _LEAST.items():
        if config[key] is None or not config[key] >= least:
            raise errors.ConfigError(f"config.{key} must be at least {least}, got {config[key]}; pass --config.{key}=NUMBER.")
    if not config.dataset:
        raise errors.ConfigError("config.dataset is not set; pass --config.dataset= 'digits', a folder or a TFDS name.")
    if config.model is None or config.pp is None:
        raise errors.ConfigError("config.model or config.pp is not set; start from vit.py:MODEL,DATASET, augreg.py or digits.py.")
    models.arguments(config)
    if config.position_stddev is not None and config.model_type == "Mixer":
        raise errors.ConfigError("config.position_stddev is for models with positions, which a Mixer has not; leave it out.")
    if config.batch % config.accum_steps:
        raise errors.ConfigError(
            f"config.batch must be a multiple of config.accum_steps, got {config.batch} and {config.accum_steps}; change either."
        )
    if config.warmup_steps >= config.total_steps:
        raise errors.ConfigError(
            f"config.warmup_steps must be less than config.total_steps, got {config.warmup_steps} and {config.total_steps}; "
            "pass a smaller --config.warmup_steps."
        )


def check_workdir(workdir):
    """Refuses a folder that holds the results of an earlier run, which this one would replace.

    Raises:
        errors.ConfigError: it does, or it is not a folder.
    """
    found = [name for name in RESULTS if (Path(workdir) / name).exists()]
    if found or (Path(workdir).exists() and not Path(workdir).is_dir()):
        raise errors.ConfigError(
            f"--workdir={workdir} must be a new folder or one without results, but {', '.join(found) or 'a file'} is there. "
            "Runs are not resumed: choose another folder or move that away."
        )


def pretrained_file(config):
    """The checkpoint that training starts from, a path or URL; None for random weights.

    Raises:
        errors.ConfigError: a local folder does not have it; errors.ArgumentError: there is no AugReg model of that name.
    """
    if not config.pretrained_dir:
        return None
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
    build = getattr(keras_vit, models.family(config))
    model = build(classes=classes, input_shape=shape, name=config.model.model_name, **models.arguments(config))
    if path:
        dropped = () if config.model.get("representation_size") else ("pre_logits/*",)
        zoo.load_weights(model, path, ignore=dropped, reset_head=True)
    elif config.position_stddev is not None:
        positions = model.get_layer("tokens").positions
        positions.assign(keras.random.normal(positions.shape, stddev=config.position_stddev, seed=config.seed))
    return model


def _sources(config):
    def source(split):
        return pipeline.open_source(config.dataset, split, data_dir=config.tfds_data_dir, manual_dir=config.tfds_manual_dir)

    return source(config.pp.train), source(config.pp.test)


def _train_batches(config, source, pixels):
    crop_flip = config.augment == "crop_flip"
    batches = pipeline.train_batches(
        source, size=config.pp.crop, batch=config.batch, pixels=pixels, seed=config.seed, shuffle_buffer=config.shuffle_buffer,
        augment=crop_flip, prefetch=config.prefetch,
    )  # fmt: skip
    return shifted(batches, config.seed) if config.augment == "shift" else batches


def _test_batches(config, source, pixels, batch):
    return pipeline.eval_batches(source, size=config.pp.crop, batch=batch, pixels=pixels, prefetch=config.prefetch)


def train(config, workdir):
    """Trains and evaluates as `config` says; stores model.keras and model.npz in `workdir`.

    Args:
        config: of a file in `keras_vit/configs`.
        workdir: folder, made if needed, once data, model and pretrained weights are in order.

    Returns:
        A `Trained`.

    Raises:
        errors.KerasViTError: the configuration, data, checkpoint or folder cannot be used.
    """
    workdir = Path(workdir)
    check_config(config)
    check_workdir(workdir)
    pretrained_file(config)  # before data are fetched
    keras.utils.set_random_seed(config.seed)
    training, test = _sources(config)
    model = build_model(config, training.num_classes)
    pixels = Pixels.from_dict(model.weights_info["preprocessing"])
    schedule = WarmupDecay(config.total_steps, config.base_lr, config.decay_type, config.warmup_steps)
    learner = finetune.learner(model.inputs, zoo.tap(model, "head"), config.accum_steps)
    optimizer = MomentumSGD(schedule, clip_norm=config.grad_norm_clip, trace_dtype=config.optim_dtype)
    learner.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.label_smoothing))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ConfigError(f"--workdir={workdir} cannot be made ({error.strerror}); choose another folder.") from error
    with Journal(workdir) as journal:
        journal.line(
            f"{model.name}: {model.count_params():,} parameters. {config.dataset}: {_count(training)} images to train on, "
            f"{_count(test)} to test, {test.num_classes} classes. {config.total_steps} steps of {config.batch} images."
        )
        try:
            share, seconds = finetune.finetune(
                learner,
                _train_batches(config, training, pixels),
                _test_batches(config, test, pixels, config.batch_eval),
                total_steps=config.total_steps,
                batch=config.batch,
                schedule=schedule,
                journal=journal,
                store=lambda: _store(model, workdir),
                progress_every=config.progress_every,
                eval_every=config.eval_every,
                checkpoint_every=config.checkpoint_every,
            )
        except tf.errors.OpError as error:
            pipeline.raise_unreadable(error, training, test)
        journal.line(f"Trained for {seconds:.1f} s; stored {workdir / 'model.keras'} and {workdir / 'model.npz'}.")
    return Trained(model, learner, test, share, seconds)


def _count(source):
    return "an unknown number of" if source.num_examples is None else f"{source.num_examples:,}"


def _store(model, workdir):
    with files.replacing(workdir / "model.keras") as temporary:
        model.save(temporary)
    zoo.save_npz(model, workdir / "model.npz")


def export(config, trained, workdir):
    """Exports `workdir/module`, loads it in another process through `hub.KerasLayer` and evaluates the whole test split there.

    Returns:
        (accuracy of the module, largest difference of its logits from the model's).

    Raises:
        errors.ExportError: it cannot be exported or loaded, or its logits differ by more than 1e-5, or by more than 1e-5 of the
            largest where that is above 1.
    """
    path, side = Path(workdir) / "module", config.pp.crop
    hub.export(trained.model, path)
    size = min(trained.test.num_examples or _CHUNK, max(1, _CHUNK // (side * side * 3)))  # tf.data allocates whole batches
    pixels = Pixels.from_dict(trained.model.weights_info["preprocessing"])
    model = keras.Model(trained.learner.inputs, trained.learner.outputs)
    model.compile(jit_compile=keras.config.backend() == "jax")  # as the module runs: XLA sums in another order
    right = count = 0
    difference = largest = 0.0
    for images, labels in _test_batches(config, trained.test, UNIT, size):
        images = np.asarray(images)
        logits = hub.check(path, images)["keras_layer"]
        expected = model.predict(pixels.normalize(images * np.float32(255)), batch_size=hub.BATCH, verbose=0)
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


def run(config, workdir):
    """The whole job: `train`, then `export` unless `config.export` is false. Returns the test accuracy of what came out last."""
    trained = train(config, workdir)
    if not config.export:
        return trained.accuracy
    print(f"Exporting {Path(workdir) / 'module'} and evaluating it in another process ...", flush=True)
    share, difference = export(config, trained, workdir)
    with Journal(workdir) as journal:
        journal.line(
            f"{Path(workdir) / 'module'} in another process through hub.KerasLayer: test accuracy {share:.4f}, "
            f"maximum difference {difference:.1e}"
        )
    return share


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
        run(config, workdir)
    except errors.KerasViTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
