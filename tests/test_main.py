"""The main job, from its command line: configurations, mistakes, and one run from a folder of JPEGs to a module."""

import json
import shutil
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_vit
from keras_vit import errors, main, zoo
from keras_vit.configs import augreg, common, digits, mixer_base16_cifar10, models, vit
from keras_vit.data import pipeline

# vit_jax/configs/common.py of the original
ORIGINAL = dict(
    pretrained_dir=".", dataset=None, tfds_manual_dir=None, tfds_data_dir=None, total_steps=None, grad_norm_clip=1.0,
    optim_dtype="bfloat16", accum_steps=8, batch=512, batch_eval=512, shuffle_buffer=50_000, eval_every=100, progress_every=10,
    checkpoint_every=1_000, prefetch=2, base_lr=0.03, decay_type="cosine", warmup_steps=500, trainer="train", model=None,
    model_or_filename=None, pp=None,
)  # fmt: skip
TOY = [
    "--config=vit.py:ViT_mu,{folder}",
    "--config.pp.crop=16",
    "--config.batch=4",
    "--config.accum_steps=2",
    "--config.warmup_steps=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """{train,test}/{dark,light}/*.jpg, 6 images each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "test"):
        for name, low in (("dark", 0), ("light", 155)):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                image = rng.integers(low, low + 100, (20 + i, 24, 3), np.uint8)
                (root / split / name / f"{i}.jpg").write_bytes(tf.io.encode_jpeg(image).numpy())
    return root


def command(workdir, *options):
    return main.main(["main", f"--workdir={workdir}", *options])


def toy(folder, *options):
    return [option.format(folder=folder) for option in TOY] + list(options)


def test_a_folder_of_jpegs_trains_evaluates_and_is_exported(folder, tmp_path, capsys):
    options = toy(
        folder, "--config.total_steps=6", "--config.pretrained_dir=", "--config.progress_every=2", "--config.eval_every=3"
    )
    assert command(tmp_path / "run", *options) == 0
    out = capsys.readouterr().out
    assert "step 6/6 100.0%" in out and "img/s/core" in out and "step 3/6 test accuracy" in out
    module = next(line for line in out.splitlines() if "hub.KerasLayer" in line)
    assert "test accuracy" in module and "maximum difference" in module
    assert module in (tmp_path / "run/train.log").read_text()
    names = {path.name.split(".tfevents")[0] for path in (tmp_path / "run").iterdir()}
    results = {"model.keras", "model.npz", "module", "train.log", "events.out", "metrics.jsonl", "report.md", "report"}
    assert names == results | {"checkpoints", ".lock"}

    model = keras.saving.load_model(tmp_path / "run/model.keras")
    again = keras_vit.ViT_mu(classes=2, weights=tmp_path / "run/model.npz", input_shape=(16, 16, 3))
    source = pipeline.open_source(folder, "test")
    images, labels = next(iter(pipeline.eval_batches(source, size=16, batch=12)))
    scores = model.predict(images, verbose=0)
    np.testing.assert_allclose(scores.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(again.predict(images, verbose=0), scores, atol=1e-6)
    share = float(np.mean(scores.argmax(-1) == np.argmax(labels, -1)))
    assert f"test accuracy {share:.4f}, maximum" in module

    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert command(tmp_path / "run", *options, "--noconfig.export") == 0  # a finished run is only evaluated again
    assert "Going on after step 6" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert command(tmp_path / "run", *options) == 1
    assert "model.keras, model.npz, module is there and no checkpoints" in capsys.readouterr().err


def test_pretrained_folder_is_loaded_with_a_new_head_of_zeros(folder, tmp_path, capsys):
    saved = keras_vit.ViT_mu(classes=7, weights=None, representation_size=24)
    keras_vit.save_npz(saved, tmp_path / "ViT_mu.npz")
    options = toy(
        folder, f"--config.pretrained_dir={tmp_path}", "--config.total_steps=2", "--config.base_lr=0", "--noconfig.export"
    )
    assert command(tmp_path / "run", *options) == 0
    before, after = np.load(tmp_path / "ViT_mu.npz"), np.load(tmp_path / "run/model.npz")
    assert set(before.files) - set(after.files) == {"pre_logits/kernel", "pre_logits/bias"}
    assert after["head/kernel"].shape == (64, 2) and not after["head/kernel"].any()
    assert after["Transformer/posembed_input/pos_embedding"].shape == (1, 5, 64)  # 4 x 4 resampled to 2 x 2
    name = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
    np.testing.assert_array_equal(after[name], before[name])
    assert not (tmp_path / "run/module").exists()


R_TOY = [
    "--config.model.hidden_size=24", "--config.model.transformer.num_layers=1", "--config.model.transformer.mlp_dim=32",
    "--config.model.resnet.width_factor=0.5", "--config.pp.crop=64", "--config.batch=4", "--config.accum_steps=1",
    "--config.total_steps=2", "--config.warmup_steps=1",
]  # fmt: skip
MIXER_TOY = ["--config=vit.py:Mixer_mu,{folder}", "--config.batch=4", "--config.accum_steps=2", "--config.warmup_steps=1"]


def r_toy(**kwargs):
    """What the overrides of R_TOY make of R+ViT-Ti_16."""
    sizes = dict(patch_size=8, width=24, depth=1, heads=3, mlp=32, stages=(), width_factor=0.5)
    return keras_vit.Hybrid(weights=None, classes=7, **{"input_shape": (64, 64, 3), **sizes, **kwargs})


def test_a_hybrid_is_built_from_the_originals_keys_and_its_checkpoint_loaded(folder, tmp_path):
    keras_vit.save_npz(r_toy(stages=(1, 1), patch_size=1, input_shape=(32, 32, 3)), tmp_path / "R50+ViT-B_16.npz")
    options = [f"--config=vit.py:r50_b16,{folder}", *R_TOY, "--config.model.resnet.num_layers=(1,1)", "--config.base_lr=0"]
    options += [f"--config.pretrained_dir={tmp_path}", "--config.model.transformer.num_heads=3", "--noconfig.export"]
    assert command(tmp_path / "run", *options) == 0
    before, after = np.load(tmp_path / "R50+ViT-B_16.npz"), np.load(tmp_path / "run/model.npz")
    assert set(before.files) == set(after.files)
    for name in ("block2/unit1/conv2/kernel", "gn_root/scale", "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"):
        np.testing.assert_array_equal(after[name], before[name])
    assert after["Transformer/posembed_input/pos_embedding"].shape == (1, 65, 24)  # 4 x 4 resampled to 8 x 8


def test_a_mixer_trains_from_its_checkpoint_and_is_exported(folder, tmp_path, capsys):
    keras_vit.save_npz(keras_vit.Mixer_mu(weights=None, classes=7), tmp_path / "Mixer_mu.npz")
    options = [option.format(folder=folder) for option in MIXER_TOY] + [f"--config.pretrained_dir={tmp_path}"]
    assert command(tmp_path / "run", *options, "--config.total_steps=3") == 0
    assert "test accuracy" in capsys.readouterr().out
    assert keras.saving.load_model(tmp_path / "run/model.keras").output_shape == (None, 2)
    assert keras_vit.Mixer_mu(weights=tmp_path / "run/model.npz").output_shape == (None, 2)
    assert command(tmp_path / "other", *options, "--config.pp.crop=48") == 1
    message = capsys.readouterr().err
    assert "CheckpointMismatchError" in message and "input_shape=(32, 32, 3)" in message
    assert not (tmp_path / "other").exists()


def test_augreg_takes_the_recommended_file_or_the_one_named_from_a_mirror_or_a_folder(folder, tmp_path, monkeypatch):
    best = keras_vit.augreg.recommended("R+Ti/16")
    tuned = f"{best}--imagenet2012-steps_20k-lr_0.03-res_224"
    (tmp_path / "mirror/vit_models/augreg").mkdir(parents=True)
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path / "mirror"))
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "home"))
    keras_vit.save_npz(r_toy(), tmp_path / f"mirror/vit_models/augreg/{best}.npz")
    keras_vit.save_npz(r_toy(), tmp_path / f"{tuned}.npz")
    options = [*R_TOY, f"--config.dataset={folder}", "--config.base_lr=0", "--noconfig.export"]
    by_name = [f"--config.model_or_filename={tuned}", f"--config.pretrained_dir={tmp_path}"]
    for run, more, file in (("mirror", [], f"mirror/vit_models/augreg/{best}.npz"), ("folder", by_name, f"{tuned}.npz")):
        assert command(tmp_path / run, "--config=augreg.py:R_Ti_16", *more, *options) == 0
        got, expected = np.load(tmp_path / run / "model.npz"), np.load(tmp_path / file)
        np.testing.assert_array_equal(got["conv_root/kernel"], expected["conv_root/kernel"])


def test_missing_checkpoint_is_named_and_nothing_is_written(folder, tmp_path, capsys):
    assert command(tmp_path / "run", *toy(folder, f"--config.pretrained_dir={tmp_path}/none")) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path}/none/ViT_mu.npz" in message and "gs://vit_models/imagenet21k" in message
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_named_and_nothing_is_stored(folder, tmp_path, capsys):
    options = toy(folder, "--config.total_steps=6", "--config.pretrained_dir=")
    broken = folder / "train/dark/broken.jpg"
    whole = (folder / "train/dark/0.jpg").read_bytes()
    try:
        for content in (b"", whole[: len(whole) // 3]):
            broken.write_bytes(content)
            assert command(tmp_path / "run", *options) == 1
            assert str(broken) in capsys.readouterr().err
            assert not any((tmp_path / "run" / name).exists() for name in main.RESULTS)
    finally:
        broken.unlink()


def test_a_tfds_name_trains_with_the_originals_preset(tmp_path, capsys):
    tfds = pytest.importorskip("tensorflow_datasets")
    options = ["--config=vit.py:ViT_mu,cifar10", "--config.pp.train=train", "--config.pp.crop=16", "--config.batch=8"]
    options += ["--config.total_steps=2", "--config.warmup_steps=1", "--config.pretrained_dir=", "--noconfig.export"]
    with tfds.testing.mock_data(num_examples=12):
        assert command(tmp_path / "run", *options) == 0, capsys.readouterr().err
    assert "cifar10: an unknown number of images" in capsys.readouterr().out
    assert keras.saving.load_model(tmp_path / "run/model.keras").output_shape == (None, 10)


@pytest.mark.parametrize("dataset", ["no_such_dataset_", "empty"])
def test_unusable_data_end_with_one_message(dataset, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    name = dataset if dataset != "empty" else str(tmp_path / "empty")
    assert command(tmp_path / "run", f"--config=vit.py:ViT_mu,{name}", "--config.pretrained_dir=") == 1
    message = capsys.readouterr().err
    assert name in message and message.startswith("DataError") and "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_common_has_every_key_of_the_original_with_its_default():
    config = common.get_config()
    assert {key: config[key] for key in ORIGINAL} == ORIGINAL
    with pytest.raises(AttributeError):
        config.batches = 3


def test_vit_config_has_the_original_values():
    config = vit.get_config("b16,cifar10")
    assert (config.base_lr, config.total_steps, config.dataset, config.batch) == (0.01, 10_000, "cifar10", 512)
    assert config.pp.to_dict() == {"train": "train[:98%]", "test": "test", "crop": 384}
    assert config.model.to_dict() == {
        "model_name": "ViT-B_16",
        "patches": {"size": (16, 16)},
        "hidden_size": 768,
        "transformer": {"mlp_dim": 3072, "num_heads": 12, "num_layers": 12, "attention_dropout_rate": 0.0, "dropout_rate": 0.0},
        "classifier": "token",
        "representation_size": None,
    }
    assert vit.get_config("l16,cifar10").base_lr == 0.03
    assert vit.get_config("l16,imagenet2012").model.transformer.dropout_rate == 0.1
    assert vit.get_config("l16,imagenet2012").pp.to_dict() == {"train": "train[:99%]", "test": "validation", "crop": 384}
    assert vit.get_config("s16_gap_norep,cifar100").model.classifier == "gap"
    assert vit.get_config("h14,cifar100").pp.crop == 378
    assert vit.get_config("ViT_B16,some/folder").pp.to_dict() == {"train": "train", "test": "test", "crop": 224}


def test_augreg_config_has_the_original_values_and_finds_its_files():
    config = augreg.get_config("B_16")
    assert (config.base_lr, config.total_steps, config.warmup_steps, config.dataset) == (0.03, 500, 100, "")
    assert config.pp.to_dict() == {"train": "train", "test": "test", "resize": 448, "crop": 384}
    assert main.pretrained_file(config) == (
        "gs://vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
    )
    assert augreg.get_config("L_16").model.transformer.dropout_rate == 0.0
    name = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
    for spelled in (name, f"{name}.npz"):
        config = augreg.get_config(spelled)
        assert config.model.model_name == "ViT-Ti_16" and main.pretrained_file(config).endswith(f"/{name}.npz")


def test_hybrids_and_mixers_have_the_original_values():
    config = vit.get_config("r50_b16,cifar10")
    assert (config.model_type, config.base_lr, config.pp.crop) == ("ViT", 0.03, 384)
    assert config.model.to_dict() == {
        "model_name": "R50+ViT-B_16",
        "patches": {"size": (1, 1)},
        "hidden_size": 768,
        "transformer": {"mlp_dim": 3072, "num_heads": 12, "num_layers": 12, "attention_dropout_rate": 0.0, "dropout_rate": 0.1},
        "classifier": "token",
        "representation_size": None,
        "resnet": {"num_layers": (3, 4, 9), "width_factor": 1},
    }
    assert vit.get_config("r_ti16,cifar100").model.resnet.num_layers == ()
    mixer = {"model_name": "Mixer-B_16", "patches": {"size": (16, 16)}, "hidden_dim": 768, "num_blocks": 12}
    mixer |= {"tokens_mlp_dim": 384, "channels_mlp_dim": 3072}
    for config in (mixer_base16_cifar10.get_config(), vit.get_config("mixer_b16,cifar10")):
        assert (config.model_type, config.dataset, config.total_steps, config.base_lr) == ("Mixer", "cifar10", 10_000, 0.03)
        assert config.pp.to_dict() == {"train": "train[:98%]", "test": "test", "crop": 224}
        assert config.model.to_dict() == mixer


# get_*_config of vit_jax/configs/models.py, but for those of tests and of LiT
KEYS = {
    "ti16", "s16", "b16", "l16", "h14", "s16_gap_norep", "b16_gap_norep", "b8", "s32", "b32", "l32", "s32_gap_norep",
    "b32_gap_norep", "r_ti16", "r50_b16", "r26_b32", "r26_s32", "r50_l32", "mixer_b16", "mixer_b32", "mixer_l16",
}  # fmt: skip


def test_the_originals_keys_name_the_originals_models():
    rows = models.rows()
    assert set(rows) >= KEYS
    for name in ("ViT-B_8", "R+ViT-Ti_16", "R26+ViT-S_32", "R26+ViT-B_32", "R50+ViT-L_32", "Mixer-L_16", "ViT-S_16-gap-norep"):
        assert vit.get_config(f"{name},cifar10").model.model_name == name
    assert set(models.augreg_rows()) == {
        "Ti_16", "S_16", "S_32", "B_8", "B_16", "B_32", "L_16", "R_Ti_16", "R26_S_32", "R50_L_32",
    }  # fmt: skip
    assert "ViT_S16_bv" not in rows  # whose wiring the original's keys cannot say


@pytest.mark.parametrize("name", sorted({row.name for row in models.rows().values()}))
def test_every_row_has_a_config_that_builds_it(name):
    row, config = zoo.VARIANTS[name], vit.get_config(f"{name},somewhere")
    arguments = models.arguments(config)
    assert models.family(config) == row.family.name
    for key, value in row.arguments.items():
        pair = key == "patch_size" and row.family.name in models.FIELDS
        assert arguments[key] == ((value, value) if pair else value)
    assert all(models.find_row(key, models.rows()) is row for key in (row.name, *row.upstream))


def test_without_config_the_digits_are_trained_and_overrides_apply():
    config, workdir = main.parse(
        ["main", "--workdir=somewhere", "--config.seed=3", "--config.pp.crop=16", "--config.total_steps=5"]
    )
    assert (workdir, config.dataset, config.seed, config.pp.crop, config.total_steps) == ("somewhere", "digits", 3, 16, 5)
    assert config.model == digits.get_config().model and main.pretrained_file(config) is None
    config, _ = main.parse(["main", "--workdir=w", "--config=augreg.py:B_16", "--config.model.representation_size=768",
                            "--config.dataset=pets", "--config.tfds_data_dir=/data", "--noconfig.export"])  # fmt: skip
    assert (config.model.representation_size, config.dataset, config.tfds_data_dir) == (768, "pets", "/data")
    assert config.export is False


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--config=vit.py:b16,cifar10", "--config.base_lrr=1"], "no key 'base_lrr'; nearest: base_lr"),
        (["--config=digits", "--config.pp.trian=x"], "no key 'pp.trian'; nearest: pp.train"),
        (["--config=digits", "--config.batch=many"], "--config.batch=many"),
        (["--config=digits", "--config.base_lr=fast"], "--config.base_lr=fast"),
        (["--config=digits", "--config.augment=flip"], "config.augment must be one of 'crop_flip', 'shift', 'none', got 'flip'"),
        (["--config=digits", "--config.batch=9", "--config.accum_steps=2"], "multiple of config.accum_steps, got 9 and 2"),
        (["--config=digits", "--config.total_steps=50"], "warmup_steps must be less than config.total_steps, got 100 and 50"),
        (["--config=digits", "--config.batch=0"], "config.batch must be at least 1, got 0"),
        (["--config=digits", "--config.model_type=Mixer"], "none of a Mixer (config.model_type='Mixer'): it lacks the keys"),
        (
            ["--config=digits", "--config.model_type=BERT"],
            "config.model_type must be one of 'ViT', 'BEiT', 'CaiT', 'CCT', 'DeiT', 'FlexiViT'",
        ),
        (["--config=vit.py:Mixer_mu,digits", "--config.position_stddev=0.5"], "which a Mixer has not"),
        (
            ["--config=vit.py:mixer_b16,digits"],
            "./Mixer-B_16.npz: there is no such checkpoint. Download it from gs://mixer_models/",
        ),
        (["--config=vit.py:SigLIP_B16_bv,digits"], "'SigLIP_B16_bv' is no model of this configuration"),
        (["--config=digits", "--config.pp.crop=9"], "9 x 9 cannot be cut into patches of 2 x 2"),
        (["--config=vit.py:b17,cifar10"], "'b17' is no model of this configuration; nearest: b16"),
        (["--config=vit.py:b16"], "vit.py expects MODEL,DATASET"),
        (["--config=augreg.py:B_16-i21k"], "no AugReg file name"),
        (["--config=augreg.py:B_16"], "config.dataset is not set"),
        (["--config=nothing.py"], "no file 'nothing.py'; this package has augreg.py, beit.py, deit.py, digits.py"),
        (["--confg=digits"], "Unknown command line flag 'confg'"),
        (["digits"], "expected options only, got digits"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(options, expected, tmp_path, capsys):
    assert command(tmp_path / "run", *options) == 1
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message and len(message.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_workdir_is_required_and_help_describes_the_job(capsys):
    assert main.main(["main"]) == 1
    assert "--workdir=DIR is needed" in capsys.readouterr().err
    assert main.main(["main", "--help"]) == 0
    assert "model.npz" in capsys.readouterr().out


def test_a_module_that_differs_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main.hub, "export", lambda model, path: path)
    monkeypatch.setattr(main.hub, "check", lambda path, images: {"keras_layer": np.full((len(images), 2), 0.5)})
    options = toy(folder, "--config.total_steps=2", "--config.pretrained_dir=")
    assert command(tmp_path / "run", *options) == 1
    assert capsys.readouterr().err.startswith("ExportError")
    assert (tmp_path / "run/model.npz").exists()


def test_the_digits_benchmark_reports_its_mean(tmp_path, monkeypatch, capsys):
    from benchmarks import digits as benchmark

    results = {0: 0.98, 1: 0.95}
    monkeypatch.setattr(
        benchmark, "train", lambda config, workdir: types.SimpleNamespace(accuracy=results[config.seed], seconds=60.0)
    )
    for seeds, status, mean in (("0", 0, 0.98), ("0,1", 1, 0.965)):
        monkeypatch.setattr("sys.argv", ["digits", f"--seeds={seeds}", f"--json={tmp_path / 'figures.json'}"])
        assert benchmark.main() == status
        assert json.loads((tmp_path / "figures.json").read_text())["accuracy"] == pytest.approx(mean)
    assert "seed 1: test accuracy 0.9500" in capsys.readouterr().out


def test_errors_of_the_job_belong_to_the_package():
    with pytest.raises(errors.ConfigError):
        main.check_config(common.get_config())
