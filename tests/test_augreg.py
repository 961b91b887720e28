"""The names and the index of the AugReg files (arXiv 2106.10270)."""

import itertools
import math
import re
import sys

import pytest

import keras_vit
from keras_vit import augreg, errors, zoo

# Model, recommended file, MiB, end of its ImageNet-1k classifier, images/s on a V100, top-1: README and notebook of the original
TABLE = """\
L/16 L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0 1243 --imagenet2012-steps_20k-lr_0.01-res_384 49.87 85.588
B/16 B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0 391 --imagenet2012-steps_20k-lr_0.03-res_384 137.92 85.486
S/16 S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0 115 --imagenet2012-steps_20k-lr_0.03-res_384 300.12 83.728
R50+L/32 R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1 1337 --imagenet2012-steps_20k-lr_0.01-res_384 326.73 85.992
R26+S/32 R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0 170 --imagenet2012-steps_20k-lr_0.01-res_384 560.40 83.846
Ti/16 Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0 37 --imagenet2012-steps_20k-lr_0.03-res_384 609.58 78.220
B/32 B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0 398 --imagenet2012-steps_20k-lr_0.01-res_384 954.94 83.586
S/32 S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0 118 --imagenet2012-steps_20k-lr_0.01-res_384 2153.94 79.584
R+Ti/16 R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0 40 --imagenet2012-steps_20k-lr_0.03-res_384 2425.77 75.402
B/8 B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0 None --imagenet2012-steps_20k-lr_0.03-res_224 nan 85.578
"""
TABLE = [line.split() for line in TABLE.splitlines()]
# Files that timm names; the eight of ViT-jax2tf
TIMM = [
    "B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224",
    "B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384",
    "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
    "B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224",
    "B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384",
    "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0",
    "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0",
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224",
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384",
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1",
    "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.03-res_224",
    "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0",
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224",
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
    "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    "S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
]
JAX2TF = [
    "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224",
    "B_16-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224",
    "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.03-res_224",
    "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224",
    "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
    "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224",
]
PETS = "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--oxford_iiit_pet-steps_{}k-lr_{}-res_{}"
NAMES = sorted(
    {*TIMM, *JAX2TF, *(row[1] for row in TABLE), *(row[1] + row[3] for row in TABLE)}
    | {PETS.format(*tuning) for tuning in itertools.product((0, 2), (0.001, 0.003, 0.01, 0.03), (224, 384))}
)


# --- names


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_parsed_and_printed_again(name):
    fields = augreg.parse(name)
    assert augreg.format(**fields) == name
    del fields["model"]
    assert augreg.format(**fields) == name
    assert augreg.parse(name + ".npz") == augreg.parse(name)


def test_every_combination_of_fields_has_a_name_of_its_own_that_gives_it_back():
    pretrained = itertools.product(
        augreg.NAMES, ("i1k", "i21k", "i21k_30"), ("none", "light0", "light1", "medium1", "medium2", "strong1", "strong2"),
        (0.03, 0.1), (0.0, 0.1),
    )  # fmt: skip
    tuned = [
        dict(adapt_ds=ds, adapt_steps=steps, adapt_lr=lr, adapt_resolution=side)
        for (ds, steps, lr), side in itertools.product(
            [("imagenet2012", 20_000, 0.03), ("cifar100", 10_000, 0.01), ("resisc45", 10_000, 0.01), ("kitti", 500, 0.001),
             ("kitti", 2500, 0.003)], (224, 384),
        )
    ]  # fmt: skip
    names = set()
    count = 0
    for (name, ds, aug, wd, do), tuning in itertools.product(pretrained, [{}, *tuned]):
        epochs = 30 if ds == "i21k_30" else 300
        fields = dict(name=name, ds=ds, epochs=epochs, lr=0.001, aug=aug, wd=wd, do=do, sd=do, **tuning)
        text = augreg.format(**fields)
        parsed = augreg.parse(text)
        assert parsed.pop("model") == text.partition("-")[0] and parsed == fields
        names.add(text)
        count += 1
    assert len(names) == count == 10 * 3 * 7 * 4 * 11


def test_fields_are_typed_as_in_the_index():
    fields = augreg.parse(PETS.format(2, 0.003, 384))
    assert fields == {
        "name": "R26+S/32", "model": "R26_S_32", "ds": "i21k", "epochs": 300, "lr": 0.001, "aug": "light1", "wd": 0.1, "do": 0.0,
        "sd": 0.0, "adapt_ds": "oxford_iiit_pet", "adapt_steps": 2500, "adapt_lr": 0.003, "adapt_resolution": 384,
    }  # fmt: skip
    for key, value in fields.items():
        assert type(value) in (augreg.COLUMNS.get(key, str), {"epochs": int}.get(key)), key
    assert augreg.parse(PETS.format(0, 0.003, 384))["adapt_steps"] == 500
    assert augreg.parse(TABLE[3][1])["name"] == "R50+L/32" and augreg.parse(TABLE[8][1])["name"] == "R+Ti/16"


GOOD = TABLE[1][1]


@pytest.mark.parametrize(
    "name",
    [
        "", "B_16", "B_16-i21k", GOOD + "--", GOOD + ".h5", f"augreg/{GOOD}", GOOD.replace("B_16", "B_17"), GOOD + "\n",
        GOOD.replace("i21k", "i22k"), GOOD.replace("medium1", "medium3"), GOOD.replace("0.1", "0.10"), GOOD.replace("300", "90"),
        GOOD + "--imagenet2012-steps_5k-lr_0.03-res_384", GOOD + "--imagenet-steps_20k-lr_0.03-res_384",
        GOOD + "--imagenet2012-steps_20k-lr_0.03-res_512", GOOD + "--imagenet2012-steps_20k-lr_0.03",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused(name):
    assert augreg.parse(name) is None
    with pytest.raises(errors.ArgumentError, match="expected an AugReg file name such as"):
        augreg.weights(name)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "B/17"}, {"name": None}, {"name": []}, {"model": "S_16"}, {"ds": "i22k"}, {"wd": "much"}, {"wd": None},
        {"epochs": 300.5}, {"epochs": math.inf}, {"lr": 1e-5}, {"adapt_ds": "kitti"}, {"adapt_lr": 0.1}, {"colour": "red"},
        dict(adapt_ds="kitti", adapt_steps=600, adapt_lr=0.1, adapt_resolution=224),
        dict(adapt_ds="kitti", adapt_steps=500, adapt_lr=0.1, adapt_resolution=225),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_name_no_file_are_refused(change):
    fields = augreg.parse(GOOD)
    assert augreg.format(**fields | {"wd": 0.1, "name": "B_16"}) == GOOD
    with pytest.raises(errors.ArgumentError, match="augreg.format: .* name no file"):
        augreg.format(**fields | change)
    with pytest.raises(errors.ArgumentError, match="augreg.format: .* name no file"):
        augreg.format(**{key: value for key, value in fields.items() if key != "aug"})


def test_a_record_says_what_a_name_says():
    record = augreg.weights(PETS.format(0, 0.003, 384))
    assert (record.classes, record.resolution, record.activation, record.tuned) == (37, 384, "softmax", True)
    pretrained = augreg.weights(GOOD + ".npz", 391)
    assert (pretrained.classes, pretrained.activation, pretrained.resolution, pretrained.tuned) == (21_843, "sigmoid", 224, False)
    assert (pretrained.source, pretrained.size) == (f"gs://vit_models/augreg/{GOOD}.npz", 391 * 2**20)
    assert augreg.weights(GOOD.replace("i21k", "i1k")).classes == 1000


# --- the index

HEADER = (
    "name,ds,epochs,lr,aug,wd,do,sd,best_val,final_val,final_test,adapt_ds,adapt_lr,adapt_steps,adapt_resolution,adapt_final_val,"
    "adapt_final_test,params,infer_samples_per_sec,filename,adapt_filename"
)
B16, MEDIUM2 = GOOD, "B_16-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0"
I1K = "B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1"
S16, R50, R26, B8 = TABLE[2][1], TABLE[3][1], TABLE[4][1], TABLE[9][1]
LINES = [  # columns up to the names, as pandas writes them; pre-trained file; end of the fine-tuned file
    ("B/16,i21k,300.0,0.001,medium1,0.1,0.0,0.0,0.51,0.505,0.5,imagenet2012,0.03,20000,384,0.9,0.85486,86570000.0,137.92",
     B16, "imagenet2012-steps_20k-lr_0.03-res_384"),
    ("B/16,i21k,300.0,0.001,medium1,0.1,0.0,0.0,0.51,0.505,0.5,imagenet2012,0.01,20000,224,0.88,0.83,86570000.0,658.56",
     B16, "imagenet2012-steps_20k-lr_0.01-res_224"),
    ("B/16,i21k,300.0,0.001,medium1,0.1,0.0,0.0,0.51,0.505,0.5,imagenet2012,0.03,20000,224,0.87,0.84,86570000.0,658.56",
     B16, "imagenet2012-steps_20k-lr_0.03-res_224"),
    ("B/16,i21k,300.0,0.001,medium2,0.03,0.0,0.0,0.504258,0.503623,0.5,imagenet2012,0.03,20000,224,0.882454,0.84018,86570000.0,658.56",
     MEDIUM2, "imagenet2012-steps_20k-lr_0.03-res_224"),
    ("B/16,i1k,300.0,0.001,strong2,0.1,0.1,0.1,0.8,0.79,0.78,imagenet2012,0.01,20000,224,,,86570000.0,658.56",
     I1K, "imagenet2012-steps_20k-lr_0.01-res_224"),
    ("B/16,i1k,300.0,0.001,strong2,0.1,0.1,0.1,0.8,0.79,0.78,imagenet2012,0.01,20000,384,0.81,0.8,86570000.0,137.92",
     I1K, "imagenet2012-steps_20k-lr_0.01-res_384"),
    ("S/16,i21k,300.0,0.001,light1,0.03,0.0,0.0,0.472676,0.472402,,imagenet2012,0.03,20000,224,0.841321,0.80462,22050000.0,1508.35",
     S16, "imagenet2012-steps_20k-lr_0.03-res_224"),
    ("R50+L/32,i21k,300.0,0.001,medium1,0.1,0.1,0.1,0.514453,0.513877,,imagenet2012,0.01,20000,224,0.897908,0.83784,110950000.0,1046.83",
     R50, "imagenet2012-steps_20k-lr_0.01-res_224"),
    ("R26+S/32,i21k,300.0,0.001,light1,0.1,0.0,0.0,0.47,0.46,,oxford_iiit_pet,0.003,500,384,0.967391,0.941946,36430000.0,560.4",
     R26, "oxford_iiit_pet-steps_0k-lr_0.003-res_384"),
    ("R26+S/32,i21k,300.0,0.001,light1,0.1,0.0,0.0,0.47,0.46,,oxford_iiit_pet,0.01,2500,224,0.934783,0.908694,36430000.0,1814.25",
     R26, "oxford_iiit_pet-steps_2k-lr_0.01-res_224"),
    ("S/16,i21k,300.0,0.001,light1,0.03,0.0,0.0,0.472676,0.472402,,oxford_iiit_pet,0.01,500,224,0.95,0.94,22050000.0,1508.35",
     S16, "oxford_iiit_pet-steps_0k-lr_0.01-res_224"),
    ("B/8,i21k,300.0,0.001,medium2,0.1,0.0,0.0,0.521426,0.521006,,imagenet2012,0.01,20000,224,0.891742,0.85948,,",
     B8, "imagenet2012-steps_20k-lr_0.01-res_224"),
]  # fmt: skip
CSV = "".join(f"{line}\n" for line in [HEADER, *(f"{text},{file},{file}--{tuning}" for text, file, tuning in LINES)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that stands for the bucket; without an index."""
    monkeypatch.setenv("KERAS_VIT_BASE_URL", str(tmp_path))
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "home"))
    (tmp_path / "vit_models" / "augreg").mkdir(parents=True)
    return tmp_path / "vit_models" / "augreg"


@pytest.fixture
def index(folder):
    (folder / "index.csv").write_text(CSV)
    return folder / "index.csv"


def test_rows_are_found_by_columns_best_first(index):
    rows = augreg.query(name="B/16", ds="i21k", adapt_ds="imagenet2012", resolution=224)
    assert [row.adapt_final_val for row in rows] == [0.882454, 0.88, 0.87]
    assert [row.aug for row in rows] == ["medium2", "medium1", "medium1"]
    assert rows == augreg.query(model="B_16", ds=["i21k"], adapt_resolution={224}, adapt_lr=(0.01, 0.03))
    assert rows == augreg.query(name=["B_16"], epochs=300, ds="i21k", resolution=range(224, 225))
    assert len(augreg.query()) == len(LINES)
    assert len(augreg.query(name=("B/8", "R26+S/32"))) == 3
    assert augreg.query(name="B/8", resolution=384) == []
    assert math.isnan(augreg.query(ds="i1k")[-1].adapt_final_val)


def test_a_row_is_typed_and_names_files_that_weights_takes(index):
    row = augreg.query(adapt_ds="oxford_iiit_pet", name="R26+S/32")[0]
    assert row == augreg.Row(
        "R26+S/32", "i21k", 300, 0.001, "light1", 0.1, 0.0, 0.0, 0.47, 0.46, row.final_test, "oxford_iiit_pet", 0.003, 500, 384,
        0.967391, 0.941946, 36_430_000, 560.4, R26, PETS.format(0, 0.003, 384),
    )  # fmt: skip
    assert math.isnan(row.final_test)
    assert type(row.epochs) is type(row.params) is type(row.adapt_steps) is int
    assert (row.file, row.top1) == (PETS.format(0, 0.003, 384), 94.195)
    fields = augreg.parse(row.file)
    assert {key: getattr(row, key) for key in fields if key != "model"} | {"model": "R26_S_32"} == fields
    assert zoo.find_weights(row.file, "any").source == f"gs://vit_models/augreg/{row.file}.npz"
    assert zoo.find_weights(row.filename, "any").classes == 21_843
    b8 = augreg.query(name="B/8")[0]
    assert b8.params is None and math.isnan(b8.infer_samples_per_sec)
    assert augreg.query(params=None) == [b8]


@pytest.mark.parametrize(
    "columns, match",
    [
        ({"resolutoin": 384}, "column 'resolutoin' does not occur; expected one of name, ds, .*adapt_resolution"),
        ({"name": "B/17"}, "name 'B/17' does not occur; expected one of .*B/16"),
        ({"name": ["B/16", "B/17"]}, "name 'B/17'"),
        ({"resolution": "384"}, "adapt_resolution '384' does not occur; expected one of 384, 224"),
        ({"resolution": 512}, "adapt_resolution 512"),
        ({"aug": "light2"}, "aug 'light2' does not occur; expected one of .*light1"),
        ({"wd": [[0.1]]}, r"wd \[0.1\] does not occur"),
        ({"filename": B16[:-1]}, f"does not occur; expected one of .*{B16}"),
    ],
)
def test_what_does_not_occur_is_refused_with_what_does(columns, match, index):
    with pytest.raises(errors.ArgumentError, match=match):
        augreg.query(**columns)


def test_among_many_values_only_the_nearest_are_named(index):
    rows = [f"{text},{file},{file}--{number}-{tuning}" for number in range(9) for text, file, tuning in LINES]
    index.write_text("\n".join([HEADER, *rows]))
    with pytest.raises(errors.ArgumentError, match=f"expected one of {B8}--8-") as caught:
        augreg.query(adapt_filename=f"{B8}--8-imagenet2012-steps_20k-lr_0.01-res_22")
    assert len(str(caught.value)) < 600
    with pytest.raises(errors.ArgumentError, match=r"expected one of .*, \.\.\.\.$"):
        augreg.query(adapt_filename="?")


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "expected rows, got none"),
        (HEADER, "expected rows, got none"),
        ("<html>not found</html>", "line 1: .*expected the columns name, ds.*got <html>"),
        (CSV.replace("final_test", "final_tset", 1), "line 1: .*expected the columns"),
        (CSV.replace(",params", "").replace(",86570000.0", ""), "line 1: .*expected the columns"),
        (CSV.replace("name,ds", "ds,name", 1), "line 1: .*expected the columns"),
        (CSV.replace("0.472402", "high", 1), "line 8: .*expected a number as final_val, got 'high'"),
        (CSV.replace(",20000,", ",20000.5,", 1), "line 2: .*expected a number as adapt_steps, got '20000.5'"),
        (CSV.replace(",384,0.9,", ",,0.9,", 1), "line 2: .*expected a number as adapt_resolution, got ''"),
        (CSV.replace("B/8", "", 1), "line 13: .*expected text as name, got ''"),
        (CSV.replace(",22050000.0", "", 1), "line 8: .*expected 21 cells, got 20"),
        (CSV + "B/8", "line 14: .*expected 21 cells, got 1"),
    ],
)
def test_another_table_is_refused_by_its_line(text, match, index):
    index.write_text(text)
    with pytest.raises(errors.DataError, match=match) as caught:
        augreg.query(name="B/16")
    assert str(index) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(index):
    index.write_bytes(b"\x80\xff\x00" * 100)
    with pytest.raises(errors.DataError, match=re.escape(str(index))):
        augreg.query()


def test_another_index_is_read_anew_and_the_same_one_is_not(index, tmp_path, monkeypatch):
    before = augreg.query(name="B/8")
    assert augreg.query(name="B/8")[0] is before[0]
    index.write_text(CSV.replace("0.85948", "0.85949"))
    monkeypatch.setenv("KERAS_VIT_HOME", str(tmp_path / "another home"))
    assert augreg.query(name="B/8")[0].adapt_final_test == 0.85949


def test_an_index_that_cannot_be_had_is_a_download_error(folder):
    with pytest.raises(errors.DownloadError, match="index.csv"):
        augreg.query(name="B/16")


# --- what to take


@pytest.mark.parametrize("name, pretrained, mib, tuning, speed, top1", TABLE)
def test_the_recommended_files_need_no_index(name, pretrained, mib, tuning, speed, top1, folder):
    assert augreg.recommended(name) == augreg.recommended(pretrained.partition("-")[0]) == pretrained
    assert augreg.recommended(name, "imagenet2012") == pretrained + tuning
    assert augreg.recommended(name, "imagenet2012", int(tuning[-3:])) == pretrained + tuning
    pick = augreg.RECOMMENDED[name]
    assert (str(pick.mib), str(pick.infer_samples_per_sec), pick.top1) == (mib, str(float(speed)), float(top1))
    assert (pick.filename, pick.file, pick.adapt_resolution) == (pretrained, pretrained + tuning, int(tuning[-3:]))


def test_the_rule_gives_the_built_in_files_from_the_index(index):
    best = max(augreg.query(name="B/16", ds="i21k"), key=lambda row: row.final_val)
    assert best.filename == augreg.recommended("B/16")
    assert augreg.query(filename=best.filename, adapt_ds="imagenet2012")[0].file == augreg.recommended("B/16", "imagenet2012")


def test_another_resolution_or_data_set_is_looked_up_among_the_recommended_files(index):
    # medium2 is better after fine-tuning, but not the best in pre-training; lr 0.03 is better in test, but not in validation
    assert augreg.recommended("B/16", "imagenet2012", 224) == f"{B16}--imagenet2012-steps_20k-lr_0.01-res_224"
    assert augreg.recommended("R26+S/32", "oxford_iiit_pet") == PETS.format(0, 0.003, 384)
    assert augreg.recommended("R26+S/32", "oxford_iiit_pet", 224) == PETS.format(2, 0.01, 224)
    assert augreg.recommended(adapt_ds="oxford_iiit_pet") == PETS.format(0, 0.003, 384)


def test_the_most_accurate_within_a_budget_is_taken(folder):
    table = {name: pretrained + tuning for name, pretrained, _, tuning, *_ in TABLE}
    imagenet = dict(adapt_ds="imagenet2012")
    assert augreg.recommended(**imagenet) == table["R50+L/32"]
    assert augreg.recommended(**imagenet, max_params=100_000_000) == table["B/8"]
    assert augreg.recommended(**imagenet, max_params=86_567_656) == table["B/16"]
    assert augreg.recommended(**imagenet, max_params=86_567_655) == table["R26+S/32"]
    assert augreg.recommended(**imagenet, max_params=3e7, resolution=384) == table["S/16"]
    assert augreg.recommended(**imagenet, resolution=384, min_images_per_second=400) == table["R26+S/32"]
    assert augreg.recommended(**imagenet, resolution=384, min_images_per_second=400, max_params=3e7) == table["S/32"]
    assert augreg.recommended(**imagenet, min_images_per_second=49) == table["R50+L/32"]
    assert augreg.recommended(max_params=3e7, min_images_per_second=2000) == augreg.recommended("S/32")


def test_where_a_built_in_file_is_too_slow_the_index_is_asked_for_224(index):
    imagenet = dict(adapt_ds="imagenet2012")
    assert augreg.recommended("B/16", **imagenet, min_images_per_second=500).endswith("lr_0.01-res_224")
    assert augreg.recommended(**imagenet, min_images_per_second=1000) == f"{R50}--imagenet2012-steps_20k-lr_0.01-res_224"
    assert augreg.recommended(**imagenet, min_images_per_second=1000, max_params=200e6).startswith(S16)


def test_parameter_counts_are_those_of_the_registry():
    rows = [row for row in zoo.VARIANTS.values() if "augreg" in row.weights]
    assert len(rows) >= 7
    for row in rows:
        name = next(iter(row.upstream)).replace("ViT-", "").replace("_", "/")
        assert augreg.RECOMMENDED[name].params == row.params


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"name": "B/17"}, "name 'B/17' does not occur"),
        ({"name": ["B/16"]}, "name .* does not occur"),
        ({"adapt_ds": "imagenet"}, "adapt_ds 'imagenet' does not occur; expected one of .*imagenet2012"),
        ({"adapt_ds": "kitti", "resolution": 512}, "resolution 512 does not occur; expected one of .*224, 384"),
        ({"resolution": 384}, "give adapt_ds too"),
        ({"max_params": "3M"}, "a budget must be a number, got '3M'"),
        ({"min_images_per_second": "9"}, "a budget must be a number, got None and '9'"),
        ({"max_params": 1e6}, "nothing fits max_params=1000000.0; augreg.RECOMMENDED has"),
        ({"name": "B/8", "adapt_ds": "imagenet2012", "resolution": 384}, "nothing fits name='B/8', .*resolution=384"),
        ({"name": "B/8", "min_images_per_second": 1}, "nothing fits name='B/8', min_images_per_second=1"),
    ],
)
def test_a_question_without_an_answer_says_why(arguments, match, folder):
    with pytest.raises(errors.ArgumentError, match=match):
        augreg.recommended(**arguments)


def test_the_tags_of_the_registry_are_the_recommended_files():
    rows = [row for row in zoo.VARIANTS.values() if {"augreg", "augreg+imagenet2012"} & set(row.weights)]
    assert len(rows) >= 6
    for row in rows:
        sources = {tag: record.source.rpartition("/")[2].removesuffix(".npz") for tag, record in row.weights.items()}
        pick = augreg.RECOMMENDED[augreg.parse(sources["augreg"])["name"]]
        assert sources["augreg"] == pick.filename
        assert row.weights["augreg"].size == (pick.mib and pick.mib * 2**20)
        tag = "augreg+imagenet2012" + ("-224" if pick.adapt_resolution == 224 else "")
        assert sources[tag] == pick.file


def test_timm_is_where_its_files_are_not_the_recommended_ones():
    ours = {file for pick in augreg.RECOMMENDED.values() for file in (pick.filename, pick.file)}
    compared = [
        file
        for file, fields in ((file, augreg.parse(file)) for file in TIMM)
        if fields["ds"] == "i21k" and (fields.get("adapt_resolution", 384) == 384 or fields["name"] == "B/8")
    ]
    assert set(augreg.TIMM) == set(compared) - ours
    assert len(augreg.TIMM) == len(set(augreg.TIMM)) == 13


def test_it_is_a_public_module():
    assert keras_vit.augreg is sys.modules["keras_vit.checkpoints.augreg"] and "augreg" in keras_vit.__all__
