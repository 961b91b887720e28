"""Published class names and prompts: complete, in order, and refused by name where there are none."""

import random

import pytest

from keras_vit import errors
from keras_vit.evaluation import prompts as lists


@pytest.mark.parametrize(
    "name, count, first, last",
    [
        ("clip", 80, "a bad photo of a {}.", "a tattoo of the {}."),
        ("clip_best", 7, "itap of a {}.", "a photo of the small {}."),
        ("lit", 81, "a bad photo of a {}.", "{}"),
        ("lit_best", 8, "itap of a {}.", "{}"),
        ("cifar100", 18, "a photo of a {}.", "a photo of the big {}."),
        ("oxford_iiit_pet", 1, "a photo of a {}, a type of pet.", "a photo of a {}, a type of pet."),
        ("resisc45", 18, "satellite imagery of {}.", "aerial view of the {}."),
        ("class_name_only", 1, "{}", "{}"),
    ],
)
def test_prompts_are_whole_and_hold_one_place_for_the_name(name, count, first, last):
    found = lists.prompts(name)
    assert (len(found), len(set(found)), found[0], found[-1]) == (count, count, first, last)
    assert all(each.count("{") == each.count("}") == each.count("{}") == 1 for each in found)
    assert name in lists.list_prompts()


@pytest.mark.parametrize(
    "dataset, count, known",
    [
        ("imagenet2012", 1000, {0: "tench", 21: "kite (bird of prey)", 134: "crane bird", 517: "construction crane"}),
        ("cifar100", 100, {0: "apple", 1: "aquarium fish", 99: "worm"}),
        ("oxford_iiit_pet", 37, {0: "Abyssinian", 12: "american bulldog", 36: "yorkshire terrier"}),
        ("resisc45", 45, {0: "airplane", 44: "wetland"}),
    ],
)
def test_class_names_are_whole_and_in_the_published_order(dataset, count, known):
    found = lists.class_names(dataset)
    assert len(found) == count and len(set(found)) == count - 2 * (dataset == "imagenet2012")
    assert {i: found[i] for i in known} == known
    assert dataset in lists.list_class_names()


def test_every_list_says_where_it_is_from():
    data = lists._lists()
    assert data["licence"].startswith("MIT License")
    assert all("openai/CLIP" in each["source"] and "commit" in each["source"] for kind in ("class_names", "prompts")
               for each in data[kind].values())  # fmt: skip


def test_class_names_follow_the_labels_of_a_data_set():
    found = lists.class_names("oxford_iiit_pet")
    labels = [name.replace(" ", "_") for name in sorted(found, key=str.lower)]  # as TFDS has them
    assert lists.class_names("oxford_iiit_pet", labels)[:2] == ("Abyssinian", "american bulldog")
    random.Random(0).shuffle(labels)
    assert [name.replace(" ", "_") for name in lists.class_names("oxford_iiit_pet", labels)] == labels
    for wrong in (labels[1:], [*labels[1:], "cat"], [*labels[1:], labels[1]]):
        with pytest.raises(errors.ArgumentError, match="labels: expected the 37 classes of oxford_iiit_pet"):
            lists.class_names("oxford_iiit_pet", wrong)


def test_text_is_canonical_as_in_the_evaluation_of_lit():
    assert lists.canonicalize(" A_Photo  of-a\n{}!") == "a photo ofa"
    assert lists.canonicalize("A photo {of} {}.", keep="{}") == "a photo of {}"
    assert lists.canonicalize("Tights, (the) hosiery.", keep=",") == "tights, the hosiery"
    assert lists.prompts("oxford_iiit_pet", canonical=True) == ("a photo of a {} a type of pet",)
    assert lists.class_names("imagenet2012", canonical=True)[21] == "kite bird of prey"


@pytest.mark.parametrize("call, message", [
    (lists.prompts, "prompts: expected one of clip, clip_best, .*, lit, lit_best, class_name_only, got 'klip'"),
    (lists.class_names, "class_names: expected one of imagenet2012, cifar100, oxford_iiit_pet, resisc45, got 'klip'"),
])  # fmt: skip
def test_unknown_lists_are_refused(call, message):
    with pytest.raises(errors.ArgumentError, match=message):
        call("klip")
    with pytest.raises(errors.ArgumentError, match=r"got \['a'\]"):
        call(["a"])
