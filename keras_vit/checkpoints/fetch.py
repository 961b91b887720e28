"""From a source (`gs://`, `https://`, local path) to a verified local file."""

import hashlib
import logging
import os
import pathlib
import urllib.parse

import pooch
import requests

from keras_vit import errors

STORAGE = "https://storage.googleapis.com"
_TIMEOUT = (10, 30)  # seconds to connect, and without a byte


def home():
    """The cache folder: `KERAS_VIT_HOME`, by default `~/.cache/keras_vit`."""
    return pathlib.Path(os.environ.get("KERAS_VIT_HOME") or "~/.cache/keras_vit").expanduser()


def _remote(source):
    """(host and path, path below the storage host) of a `gs://` or `https://` source."""
    if source.startswith("gs://"):
        source = f"{STORAGE}/{source.removeprefix('gs://')}"
    parts = urllib.parse.urlsplit(source)
    path = urllib.parse.unquote(parts.path).lstrip("/")
    if not path or ".." in path.split("/"):
        raise errors.DownloadError(f"{source}: expected a URL with a plain path to a file.")
    return parts.netloc, path


def fetch(source, size=None):
    """A local path holding the file that `source` names.

    `KERAS_VIT_BASE_URL`, a folder or a URL, serves `gs://` files and those of storage.googleapis.com under the same paths (a
    folder needs no network and is used in place). Downloads lie in `KERAS_VIT_HOME` under host and path, so equal basenames
    never meet. A file gets its name only when complete; its sha256 is recorded beside it and checked at every use.

    Args:
        source: `gs://bucket/path`, `https://host/path` or a local path.
        size: published size in bytes; a download more than 1% off is refused.

    Raises:
        errors.DownloadError, errors.IntegrityError, errors.CacheError, errors.ArgumentError.
    """
    source = os.fspath(source)
    scheme = urllib.parse.urlsplit(source).scheme if "://" in source else ""
    if scheme not in ("gs", "https", ""):
        raise errors.DownloadError(f"{source}: expected gs://, https:// or a local path, got {scheme}://.")
    if not scheme:
        path = pathlib.Path(source).expanduser()
        if not path.is_file():
            raise errors.ArgumentError(f"{source}: expected a file, found nothing; check the path.")
        return path
    host, path = _remote(source)
    base = os.environ.get("KERAS_VIT_BASE_URL", "")
    url = f"https://{host}/{urllib.parse.quote(path)}"
    if base and host == urllib.parse.urlsplit(STORAGE).netloc:
        if "://" not in base:
            local = pathlib.Path(base).expanduser() / path
            if not local.is_file():
                raise errors.DownloadError(
                    f"{source}: KERAS_VIT_BASE_URL is the folder {base}, which has no file {path}; put it there or unset it."
                )
            return local
        url = f"{base.rstrip('/')}/{urllib.parse.quote(path)}"
        host = urllib.parse.urlsplit(base).netloc.replace(":", "_")
    return _cached(url, home() / host / path, size)


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(url, path, size):
    record = path.with_name(path.name + ".sha256")
    if path.is_file() and record.is_file():
        expected, got = record.read_text().strip(), sha256(path)
        if expected != got:
            raise errors.IntegrityError(
                f"{path}: expected sha256 {expected}, recorded at its download, got {got}; delete the file to fetch it anew."
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.CacheError(f"{path.parent}: cannot be made ({error}); set KERAS_VIT_HOME to a writable folder.") from error
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    logging.getLogger("keras_vit").info("downloading %s to %s", url, path)
    try:
        _download(url, part)
        got = part.stat().st_size
        if size and abs(got - size) > size / 100:
            raise errors.IntegrityError(f"{url}: expected about {size:,} bytes, got {got:,}; nothing was kept. Check the source.")
        digest = sha256(part)
        record.write_text(digest + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _download(url, part):
    try:
        pooch.HTTPDownloader(timeout=_TIMEOUT)(url, part, None)
    except requests.RequestException as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise errors.DownloadError(
            f"{url}: could not be downloaded ({f'HTTP {status}' if status else error}); nothing was kept. Check the network, or "
            "serve a copy from a folder named by KERAS_VIT_BASE_URL."
        ) from error
    except OSError as error:
        raise errors.CacheError(f"{part.parent}: cannot be written ({error}); set KERAS_VIT_HOME to another folder.") from error
