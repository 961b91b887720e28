"""Checkpoint maps as data: ordered rules (original name, our name, transform), read forward to load and backward to write."""

import dataclasses
import re

from keras_vit.checkpoints.transforms import Whole

_FIELD = re.compile(r"\{([a-z]+)\}")


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
        return self.text.format(**fields)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One array of an original file and the weight of ours it becomes."""

    original: Template
    ours: Template
    transform: Whole = Whole()

    def __post_init__(self):
        if self.original.fields != self.ours.fields:
            raise ValueError(f"Rule {self.original.text!r} -> {self.ours.text!r}: both sides need the same fields.")


def rule(original, ours, transform=None):
    return Rule(Template(original), Template(ours), transform or Whole())


class Names:
    """The map of one layout: an ordered list of rules, given singly or in lists."""

    def __init__(self, *rules):
        self.rules = [r for group in rules for r in (group if isinstance(group, list) else [group])]

    def under(self, prefix):
        """The same map for a file that has all its arrays under `prefix`, such as "params/"."""
        return Names([dataclasses.replace(r, original=Template(prefix + r.original.text)) for r in self.rules])

    def to_ours(self, original):
        """[(our name, transform)] of every rule that claims an original name: one, unless the file or the map is wrong."""
        matches = ((r, r.original.match(original)) for r in self.rules)
        return [(r.ours.format(fields), r.transform) for r, fields in matches if fields is not None]

    def to_original(self, ours):
        """[(original name, transform)] of every array that one of our weights is written as."""
        matches = ((r, r.ours.match(ours)) for r in self.rules)
        return [(r.original.format(fields), r.transform) for r, fields in matches if fields is not None]
