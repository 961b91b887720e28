"""From a source (a path or a `gs://`, `hf://`, `https://` URL) to a verified local file: the cache, and its lock file."""

import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import stat
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

import filelock

from keras_vit import errors
from keras_vit.checkpoints import download, files

STORAGE = "https://storage.googleapis.com"
_STORAGE_HOST = urlsplit(STORAGE).netloc
_HUGGING_FACE = "huggingface.co"
# A name such as deit_tiny-a1311bcf.pth ends in the first digits of its sha256, unless they are a date
_HASHED = re.compile(r"-(?!(?:19|20)\d\d[01]\d[0-3]\d\.)([0-9a-f]{8})\.(?:pth|pt|pth\.tar|pyth)$")
_log = logging.getLogger("keras_vit")


class Fetched(NamedTuple):
    """A local file and its sha256, which was verified; None for a plain local path, which is not hashed."""

    path: pathlib.Path
    sha256: str | None


def home():
    """The cache folder: `KERAS_VIT_HOME`, by default `~/.cache/keras_vit`."""
    return pathlib.Path(os.environ.get("KERAS_VIT_HOME") or "~/.cache/keras_vit").expanduser()


def lock_file():
    """The record of what each source held when first used: `KERAS_VIT_LOCK`, by default `keras_vit.lock` in the cache folder."""
    return pathlib.Path(os.environ.get("KERAS_VIT_LOCK") or home() / "keras_vit.lock").expanduser()


def fetch(source, size=None, *, force=False):
    """The `Fetched` file that `source` names.

    `KERAS_VIT_BASE_URL`, a mirror's URL or a folder, serves `gs://` files and those of storage.googleapis.com under the same
    paths (a folder needs no network and is used in place). Downloads lie in `KERAS_VIT_HOME` under host and path. What a source
    holds at its first use is recorded in `lock_file()` and demanded ever after, wherever the bytes come from; a cached file that
    was altered is downloaded again. With `KERAS_VIT_OFFLINE=1` only what is cached, or lies in the folder, is served.

    Args:
        source: `gs://bucket/path`, `https://host/path`, `hf://owner/repository/path[@revision]` of huggingface.co (by default of
            its branch main), or a local path. Where the name ends in the first eight digits of its sha256, as `name-1a2b3c4d.pth`
            of PyTorch's hub does, the file must have it.
        size: published size in bytes; while there is no record, a file more than 1% off is refused.
        force: download also what lies in the cache, which stays if that fails.

    Raises:
        errors.DownloadError, errors.IntegrityError, errors.CacheError, errors.ArgumentError.
    """
    source = os.fspath(source)
    if "://" not in source:
        path = pathlib.Path(source).expanduser()
        if not path.is_file():
            raise errors.ArgumentError(f"{source}: expected a file, found nothing; check the path.")
        return Fetched(path, None)
    host, path = _split(source)
    source, origin = _canonical(host, path), _origin(host, path)
    try:
        if isinstance(origin, str):
            return _from_cache(source, origin, home() / _folder(host) / path, size, force)
        if not origin.is_file():
            base = os.environ["KERAS_VIT_BASE_URL"]
            raise errors.DownloadError(
                f"{source}: KERAS_VIT_BASE_URL is the folder {base}, which has no file {path}; put it there or unset it."
            )
        return Fetched(origin, _verified(source, origin, origin, size))
    except errors.KerasViTError:
        raise
    except OSError as error:
        raise errors.CacheError(
            f"{error.filename or home()}: cannot be read or written ({error.strerror or error}) to have {source}; make room, "
            "or set KERAS_VIT_HOME to a writable folder, KERAS_VIT_LOCK to a writable file. Files in the cache are as they were."
        ) from error


def url(source):
    """The URL at which a source that is no local path is asked for, of the mirror where one is set; `file:` of a folder."""
    origin = _origin(*_split(source))
    return origin if isinstance(origin, str) else origin.absolute().as_uri()


def cached():
    """[(source, path, size in bytes)] of the files in the cache."""
    found = []
    for path in sorted(home().glob("*/**/*")):
        folder, *below = path.relative_to(home()).parts
        if path.is_file() and not any(part.startswith(".") for part in (folder, *below)):
            found.append((_canonical(folder.replace("_", ":"), "/".join(below)), path, path.stat().st_size))
    return found


def sha256(path, opener=None):
    """Hex digest of a file."""
    with open(path, "rb", opener=opener) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(source):
    """(host, path on it) of a source that is no local path; that of a URL is escaped, that of others literal."""
    scheme, _, rest = source.partition("://")
    if scheme.lower() == "gs":
        host, path = _STORAGE_HOST, rest
    elif scheme.lower() == "hf":
        found = re.fullmatch(r"([^/@]+/[^/@]+)/([^@]+)(?:@([^@/]+))?", rest)
        if not found:
            raise errors.DownloadError(f"{source}: expected hf://owner/repository/path/of/file, or that and @revision.")
        host, path = _HUGGING_FACE, f"{found[1]}/resolve/{found[3] or 'main'}/{found[2]}"
    elif scheme.lower() == "https":
        found = re.fullmatch(r"([a-z0-9][a-z0-9.-]*(?::\d+)?)/([^?#]+)", rest, re.IGNORECASE)
        host, path = (found[1].lower(), unquote(found[2])) if found else ("", "")
    else:
        raise errors.DownloadError(f"{source}: expected gs://, hf://, https:// or a local path, got {scheme}://.")
    if any(not part or part.startswith(".") or not part.isprintable() for part in path.split("/")):
        raise errors.DownloadError(
            f"{source}: expected a host and a plain path to a file, without user, query, fragment, '..', hidden or empty parts."
        )
    return host, path


def _folder(host):
    return host.replace(":", "_")  # a host has no "_", some file systems no ":"


def _canonical(host, path):
    return f"gs://{path}" if host == _STORAGE_HOST else f"https://{host}/{quote(path)}"


def _origin(host, path):
    """Where a file lies: a URL, or a `Path` in the folder that KERAS_VIT_BASE_URL names."""
    base = (host == _STORAGE_HOST and os.environ.get("KERAS_VIT_BASE_URL")) or f"https://{host}"
    if "://" not in base:
        return pathlib.Path(base).expanduser() / path
    if not base.startswith(("https://", "http://")):
        raise errors.DownloadError(f"KERAS_VIT_BASE_URL={base}: expected https://, http:// or a folder.")
    return f"{base.rstrip('/')}/{quote(path)}"


@functools.cache
def _warn_of_others(folder):
    """Says once of a cache that is in others' hands: who replaces a file there can replace what the lock file says of it."""
    found = folder.stat() if os.name == "posix" and folder.exists() else None
    if found and found.st_uid not in (0, os.getuid()):
        reason = f"belongs to user {found.st_uid}"
    elif found and found.st_mode & stat.S_IWOTH:
        reason = f"may be written by everybody (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    _log.warning("%s %s; trust its weights as you trust them, or set KERAS_VIT_HOME and KERAS_VIT_LOCK", folder, reason)


def _from_cache(source, origin, final, size, force):
    _warn_of_others(home())
    found = None if force else _intact(source, final, size)
    if found:
        return found
    if os.environ.get("KERAS_VIT_OFFLINE", "").lower() not in ("", "0", "false"):
        have = "; ".join(f"{name} ({length:,} bytes)" for name, _, length in cached()) or "nothing"
        raise errors.CacheError(
            f"{source}: {'cannot be had anew' if force else f'has no intact copy in {home()}'}, since KERAS_VIT_OFFLINE is set. "
            f"Cached: {have}. Unset it, or serve the file from a folder named by KERAS_VIT_BASE_URL."
        )
    parts = final.with_name(f".{final.name}")
    parts.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(parts / "lock"):
        found = None if force else _intact(source, final, size)  # another process may have been here meanwhile
        if found:
            return found
        if not force and os.path.lexists(final):
            _log.warning("%s is not what %s records; it is downloaded again", final, lock_file())
        return _download(source, origin, parts, final, size)


def _intact(source, final, size):
    """The cached file, or None where there is none, only a link, or other bytes than the lock file demands."""

    def nofollow(path, flags):
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))  # Windows has none

    try:
        return Fetched(final, _verified(source, final, final, size, nofollow))
    except FileNotFoundError:
        return None
    except OSError as error:
        if not isinstance(error, errors.IntegrityError) and error.errno != errno.ELOOP:
            raise
        return None


def _download(source, origin, parts, final, size):
    """Downloads, verifies, then puts into place in one step; what the lock file refuses is removed, in the cache too."""
    _log.info("downloading %s to %s", origin, final)
    while True:
        part = download.download(origin, parts, lambda total: _check_size(source, origin, total, size))
        try:
            digest = _verified(source, part, origin, size)
            os.replace(part, final)
        except FileNotFoundError:  # where file locks do nothing, another process may have put our part, or its own, into place
            if part.exists():
                raise
            if found := _intact(source, final, size):
                return found
            continue
        except errors.IntegrityError:
            part.unlink(missing_ok=True)
            if not _intact(source, final, size):
                final.unlink(missing_ok=True)
            raise
        download.sweep(parts)
        return Fetched(final, digest)


def _verified(source, path, where, size, opener=None):
    """The sha256 of a file, held against its record, which the first use makes; `where` is what messages call it."""
    digest, got = sha256(path, opener), path.stat().st_size
    _check_size(source, where, got, size)
    named = _HASHED.search(source.rpartition("/")[2])
    if named and not digest.startswith(named[1]):
        raise errors.IntegrityError(
            f"{where}: expected a file whose sha256 begins with {named[1]}, as its name says, got {digest}; not used. Check its "
            "origin."
        )
    record = _records().get(source) or _record(source, {"sha256": digest, "size": got})
    if digest != record["sha256"]:
        raise _refused(source, where, record, f"sha256 {digest}")
    return digest


def _check_size(source, where, got, published):
    """Refuses bytes by their number alone: exactly that of the record, or within 1% of what is published."""
    record = _records().get(source)
    if record and got != record["size"]:
        raise _refused(source, where, record, f"{got:,} bytes")
    if not record and published and abs(got - published) > published / 100:
        raise errors.IntegrityError(f"{where}: expected about {published:,} bytes, got {got:,}; not used. Check its origin.")


def _refused(source, where, record, got):
    return errors.IntegrityError(
        f"{where}: expected sha256 {record['sha256']} of {record['size']:,} bytes, recorded for {source} in {lock_file()}, "
        f"got {got}; not used. Check its origin; if its publisher replaced it and you trust that, delete the record, then repeat."
    )


def _records():
    """{source: {"sha256", "size"}} of the lock file; {} where there is none."""
    path = lock_file()
    try:
        records = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise errors.CacheError(f"{path}: expected a lock file in JSON, got {error}; restore it or delete it.") from error
    if not isinstance(records, dict):
        raise errors.CacheError(f"{path}: expected an object of sources, got {str(records)[:40]!r}; restore it or delete it.")
    for source, record in records.items():
        well = isinstance(record, dict) and record.keys() == {"sha256", "size"} and type(record["size"]) is int
        if not well or not re.fullmatch("[0-9a-fA-F]{64}", str(record["sha256"])):
            raise errors.CacheError(
                f'{path}: {source}: expected {{"sha256": 64 hex digits, "size": bytes}}, got {record!r}; correct or delete it.'
            )
        record["sha256"] = record["sha256"].lower()
    return records


def _record(source, record):
    """Records what a source holds, unless another process just did; returns the record in force."""
    path = lock_file().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.writing")):
        records = _records()
        if source not in records:
            records[source] = record
            with files.replacing(path) as temporary:
                pathlib.Path(temporary).write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
        return records[source]
