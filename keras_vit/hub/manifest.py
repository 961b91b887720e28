"""What is in a module's folder, to the bit: a manifest inside it, and one number that stands for all of its files."""

import hashlib
import json
from pathlib import Path

from keras_vit.checkpoints import fetch
from keras_vit.errors import IntegrityError, UntrustedArtifactError

MANIFEST = "manifest.json"
FORMAT = 1
_SHOWN = 5  # files named in an error


def write(folder, about):
    """Writes the manifest of the files that are in a folder.

    Args:
        folder: of a module that is complete.
        about: dict of what JSON can hold, kept beside the files.
    """
    record = {"format": FORMAT, **about, "files": _files(folder)}
    Path(folder, MANIFEST).write_text(json.dumps(record, indent=1) + "\n")


def verify(path):
    """Checks every file of a module against the manifest that `export` put there.

    Args:
        path: folder of a module.

    Returns:
        The manifest, a dict: "files" {name: {"bytes", "sha256"}}, "variables", and what else `export` says of the module.

    Raises:
        UntrustedArtifactError: there is no manifest, or none that can be read.
        IntegrityError: files are missing, surplus or of other content; they are named.
    """
    try:
        record = json.loads(Path(path, MANIFEST).read_text())
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in record["files"].items()}
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, where {FORMAT} is known")
    except FileNotFoundError as error:
        raise UntrustedArtifactError(
            f"{path}: expected a module with a {MANIFEST}, as keras_vit.hub.export writes it, got none. If you know where it is "
            "from, pin what is there now: digest=keras_vit.hub.digest(path)."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UntrustedArtifactError(f"{path}: its {MANIFEST} cannot be read ({error}). Export the module again.") from error
    found = {name: (file["bytes"], file["sha256"]) for name, file in _files(path).items()}
    faults = [
        *(f"{name} is missing" for name in sorted(set(expected) - set(found))),
        *(f"{name} is not in the manifest" for name in sorted(set(found) - set(expected))),
        *(
            f"{name}: expected {expected[name][0]} bytes of sha256 {expected[name][1][:12]}..., got {found[name][0]} of "
            f"{found[name][1][:12]}..."
            for name in sorted(set(found) & set(expected))
            if found[name] != expected[name]
        ),
    ]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise IntegrityError(f"{path}: not the module that was exported: {'; '.join(faults[:_SHOWN])}{more}. Export it again.")
    return record


def digest(path):
    """The sha256, in hexadecimal, of the names and contents of all files in a folder but the manifest."""
    return digest_of(_files(path))


def digest_of(files):
    """`digest` of a module whose manifest, verified, holds these "files"; so that none is read once more."""
    listed = "".join(f"{file['sha256']} {name}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def _files(folder):
    """{name below the folder: {"bytes", "sha256"}}, without the manifest. A link is refused: what it leads to may change."""
    found = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.is_symlink():
            raise IntegrityError(f"{file}: expected plain files and folders in a module, got a link. Copy what it leads to.")
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST:
            found[name] = {"bytes": file.stat().st_size, "sha256": fetch.sha256(file)}
    return found
