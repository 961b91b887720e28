"""Checkpoint maps as data: ordered rules (original name, our name, transform), read forward to load and backward to write."""

import dataclasses
import fnmatch
import re
from typing import NamedTuple

from keras_vit.checkpoints.transforms import Whole

_FIELD = re.compile(r"\{([a-z]+)\}")
_NUMBERS = re.compile(r"(?:\{[a-z]+\}|\d)+")


class Template:
    """A name with integer fields, such as `encoderblock_{i}/LayerNorm_0`; matched and formatted, never a free regex."""

    def __init__(self, text):
        parts = _FIELD.split(text)
        self.text, self.fields = text, frozenset(parts[1::2])
        if len(self.fields) != len(parts[1::2]) or re.search(r"[{}]", "".join(parts[::2])):
            raise ValueError(f"Template {text!r}: each field must be written once, as {{i}}.")
        literals = [re.escape(part) for part in parts[::2]]
        groups = [rf"(?P<{field}>0|[1-9]\d{{0,5}})" for field in parts[1::2]] + [""]
        self._pattern = re.compile("".join(map("".join, zip(literals, groups))))

    def match(self, name):
        """The fields of `name` as a dict of int, or None if the name is not of this form."""
        found = self._pattern.fullmatch(name)
        return found and {field: int(value) for field, value in found.groupdict().items()}

    def format(self, fields):
        return _FIELD.sub(lambda found: str(fields[found[1]]), self.text)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One array of an original file and the weight of ours it becomes.

    Args:
        original, ours: templates of the same fields.
        transform: how array and weight relate.
        stacked: the field of `ours` that the original lacks: it keeps the weights of all its values in one array, along a new
            first axis.
    """

    original: Template
    ours: Template
    transform: Whole = Whole()
    stacked: str | None = None

    def __post_init__(self):
        if self.original.fields | ({self.stacked} if self.stacked else set()) != self.ours.fields:
            raise ValueError(f"Rule {self.original.text!r} -> {self.ours.text!r}: both sides need the same fields.")


class _Index:
    """Rules by what their templates have besides numbers, so that a name meets only the few that may fit it."""

    def __init__(self, rules, side):
        self.side, self.rules = side, {}
        for r in rules:
            self.rules.setdefault(_NUMBERS.sub("#", getattr(r, side).text), []).append(r)

    def find(self, name):
        """[(rule, fields)] of the rules whose template is of the form of `name`."""
        matches = ((r, getattr(r, self.side).match(name)) for r in self.rules.get(_NUMBERS.sub("#", name), ()))
        return [(r, fields) for r, fields in matches if fields is not None]


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array of an original file that is no weight: it is kept, or made again, for the way back.

    Args:
        original, ours: templates of the same fields; `ours` is the weight in whose company it stands.
        make: (shape of that weight, (h, w) of the model's grid or None for a square) -> the array, where it follows from them;
            a file's must equal it. None where it is a count, such as that of training steps: the file's is kept, 0 without one.
    """

    original: Template
    ours: Template
    make: object = None


class Piece(NamedTuple):
    """Where a weight of ours, or a part of it, stands in a file.

    Attributes:
        original: name of the array.
        transform: how the array, or its layer, relates to the weight.
        layer: index into the first axis of an array that stacks several weights; None for an array of its own.
    """

    original: str
    transform: Whole
    layer: int | None


def rule(original, ours, transform=None):
    return Rule(Template(original), Template(ours), transform or Whole())


def constant(original, ours, make=None):
    return Constant(Template(original), Template(ours), make)


def within(rules, original, ours):
    """The same rules for arrays under the prefix `original` of a file and weights under the prefix `ours` of a model."""
    return [
        dataclasses.replace(r, original=Template(original + r.original.text), ours=Template(ours + r.ours.text)) for r in rules
    ]


class Names:
    """The map of one layout: an ordered list of rules and constants, given singly or in lists.

    Args:
        rules: the map.
        beside: patterns of names that such files hold for something else, such as an optimizer's state; they are left out, and
            reported.
    """

    def __init__(self, *rules, beside=()):
        rules = [r for group in rules for r in (group if isinstance(group, list) else [group])]
        self.rules = [r for r in rules if isinstance(r, Rule)]
        self.constants = [r for r in rules if isinstance(r, Constant)]
        self.beside = tuple(beside)
        self._originals, self._ours = _Index(self.rules, "original"), _Index(self.rules, "ours")
        self._constants, self._companions = _Index(self.constants, "original"), _Index(self.constants, "ours")

    def under(self, prefix, beside=()):
        """The same map for a file that has all its arrays under `prefix`, such as "params/"."""
        rules = [*self.rules, *self.constants]
        return Names([dataclasses.replace(r, original=Template(prefix + r.original.text)) for r in rules], beside=beside)

    def stacked(self, each, together, field="i"):
        """The same map for a file that keeps what lies under `each`, which has `field`, in one array each under `together`."""

        def stack(r):
            if not r.original.text.startswith(each):
                return r
            return dataclasses.replace(r, original=Template(together + r.original.text.removeprefix(each)), stacked=field)

        return Names([*map(stack, self.rules), *self.constants], beside=self.beside)

    def is_beside(self, original):
        """Whether such files hold `original` for something else."""
        return any(fnmatch.fnmatchcase(original, pattern) for pattern in self.beside)

    def constant(self, original):
        """(our name of the weight beside it, make) of an array that is no weight (see `Constant`), None for any other."""
        found = self._constants.find(original)
        return (found[0][0].ours.format(found[0][1]), found[0][0].make) if found else None

    def constants_beside(self, ours):
        """[(original name, make)] of the arrays that stand in the company of one of our weights."""
        return [(r.original.format(fields), r.make) for r, fields in self._companions.find(ours)]

    def to_ours(self, original, layers=1):
        """[(our name, transform, layer)] of every rule that claims an original name.

        A rule that stacks gives `layers` names, any other one, with layer None; more than one rule is an error of map or file.
        """
        return [
            (r.ours.format({**fields, r.stacked: layer}), r.transform, layer)
            for r, fields in self._originals.find(original)
            for layer in (range(layers) if r.stacked else (None,))
        ]

    def to_original(self, ours):
        """Every `Piece` that one of our weights is written as."""
        found = self._ours.find(ours)
        return [Piece(r.original.format(fields), r.transform, fields.get(r.stacked)) for r, fields in found]
