"""One URL into a file, whole or not at all: time-outs, tries, resumption.

What has arrived is a part, `<ETag of its bytes>~<token>.part`. So it is only ever continued with bytes of the same version, each
written where it belongs; and the token, drawn when it is made, keeps the name from ever meaning another file. So processes that
share a part by mistake, on file systems whose locks do nothing, do no harm. Without a strong ETag a part is not continued.
"""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
from urllib.parse import quote, unquote, urljoin, urlsplit

import requests
import tqdm
import urllib3

from keras_vit import errors

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds to connect, and without a byte
TRIES = 5  # requests for one file
BACKOFF = 0.5  # seconds; the waits are 0, 2, 4 and 8 times this
RETRY_AFTER = 60  # seconds, the longest wait that a server may ask for
PASSING = {429, 500, 502, 503, 504}  # HTTP states that may be over at the next try
REDIRECTS = {"storage.googleapis.com", "objects.githubusercontent.com", "release-assets.githubusercontent.com"}
_CDN = re.compile(r"([a-z0-9-]+\.)+hf\.co|cdn-lfs[a-z0-9-]*\.huggingface\.co")  # Hugging Face's own, which change their names
_STRONG = quote('"')  # how the name of a part with a strong ETag begins
_CHUNK = 2**20  # bytes


class _Fault(Exception):
    """An attempt that failed: `again` if another may succeed, after the wait that `response` asks for."""

    def __init__(self, reason, again=True, response=None, error=errors.DownloadError):
        super().__init__(reason)
        self.again, self.response, self.error = again, response, error


class _Session(requests.Session):
    """Follows redirects that stay on their host or lead to REDIRECTS or _CDN, by https unless the user's own URL says http."""

    def get_redirect_target(self, resp):
        target = super().get_redirect_target(resp)
        if target is not None:
            here, there = urlsplit(resp.url), urlsplit(urljoin(resp.url, target))
            stays = there.netloc == here.netloc and there.scheme in ("https", here.scheme)
            known = there.netloc in REDIRECTS or _CDN.fullmatch(there.netloc)
            if not stays and not (there.scheme == "https" and known):
                raise errors.DownloadError(
                    f"{resp.url}: redirects to {there.geturl()}, expected https:// and the same host or one of "
                    f"{sorted(REDIRECTS)} or *.hf.co; not followed. If you trust it, name that address itself."
                )
        return target


def download(url, folder, check):
    """The path of a file in `folder` that holds all of what `url` serves; after a failed call the next goes on where it ended.

    Args:
        url: `https://` or `http://`.
        folder: for the parts of this one file; exists.
        check: (size in bytes) -> None, raises on an announced size that is wrong.

    Raises:
        errors.DownloadError: not to be had, after as many tries as make sense. errors.IntegrityError: a page, or cut short.
        errors.CacheError: the disk has no room. OSError: the folder cannot be written.
    """
    tries = urllib3.Retry(TRIES - 1, backoff_factor=BACKOFF, retry_after_max=RETRY_AFTER)
    with _Session() as session:
        while True:
            try:
                return _attempt(session, url, folder, check)
            except _Fault as fault:
                tries = _wait(tries, fault, url, folder)


def sweep(folder):
    """Removes every part."""
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)


def _wait(tries, fault, url, folder):
    """Pauses; returns the tries that are left, or raises if there are none."""
    if fault.again:
        with contextlib.suppress(urllib3.exceptions.HTTPError):  # none left, or a Retry-After that is no time
            tries = tries.increment("GET", url, error=fault)
            tries.sleep(fault.response)
            return tries
    kept = sum(part.stat().st_size for part in folder.glob(f"{_STRONG}*.part"))
    left = f"the next call goes on after {kept:,} bytes" if kept else "nothing was kept"
    raise fault.error(
        f"{url}: could not be downloaded ({fault}); {left}. "
        "Check the name and the network, or serve a copy from a folder named by KERAS_VIT_BASE_URL."
    ) from fault


def _attempt(session, url, folder, check):
    """One request, for all that is missing; returns the path of the part, whole."""
    with _leftover(folder) or contextlib.nullcontext() as old:
        start, etag = (old.tell(), _etag(old.name)) if old else (0, "")
        headers = {"Range": f"bytes={start}-", "If-Range": etag} if start else {}
        with _get(session, url, {"Accept-Encoding": "identity", **headers}) as response:
            if response.status_code == 200:
                start, total = 0, response.raw.length_remaining
            else:
                found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
                if not start or not found or int(found[1]) != start or response.headers.get("ETag") != etag:
                    _remove(old)
                    raise _Fault(f"HTTP {response.status_code}, which does not go on after {start:,} bytes of version {etag}")
                total = int(found[2])
            _check_answer(response, url, total, check)
            _check_room(folder, url, (total or 0) - start)
            if start:
                return _receive(response, old, total)
            _remove(old)
            with open(_name(folder, response.headers.get("ETag", "")), "xb") as new:
                return _receive(response, new, total)


def _name(folder, etag):
    """The path of a part to begin; without a strong ETag the name says that it cannot be continued."""
    name = f"{quote(etag, safe='')}~{secrets.token_hex(8)}.part"
    return folder / (name if etag.startswith('"') and len(name) < 256 else f"~{secrets.token_hex(8)}.part")


def _etag(path):
    return unquote(os.path.basename(path).rpartition("~")[0])


def _leftover(folder):
    """The open part of an earlier attempt, to be continued where it stands; None if there is none."""
    for left in folder.glob(f"{_STRONG}*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process was done with it, if file locks do nothing
            file = open(left, "r+b")  # noqa: SIM115 - closed by the caller
            file.seek(max(os.path.getsize(file.fileno()) - 1, 0))  # its last byte again: behind a whole part no range is valid
            return file
    return None


def _remove(file):
    if file:
        file.close()
        pathlib.Path(file.name).unlink(missing_ok=True)


def _get(session, url, headers):
    try:
        response = session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    except (requests.RequestException, ValueError) as error:  # requests lets ValueError of broken addresses through
        reset = bool(error.args) and isinstance(error.args[0], urllib3.exceptions.ProtocolError)
        raise _Fault(f"{type(error).__name__}: {error}", again=reset) from error
    if response.status_code in (200, 206, 416):
        return response
    response.close()
    state = f"HTTP {response.status_code} {response.reason}"
    raise _Fault(state, again=response.status_code in PASSING, response=response.raw)


def _check_answer(response, url, total, check):
    """Refuses by its header what cannot be the file."""
    kind, length = response.headers.get("Content-Type", "").lower(), "unknown" if total is None else f"{total:,}"
    if kind.startswith("text/html"):
        raise errors.IntegrityError(
            f"{url}: expected a file, server sent text/html, {length} bytes; nothing was kept. Is there a sign-in page before it?"
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise errors.IntegrityError(
            f"{url}: expected plain bytes, server sent them as {encoding}; nothing was kept. Use another server."
        )
    if total is not None:
        check(total)
    elif "chunked" not in response.headers.get("Transfer-Encoding", ""):
        raise errors.IntegrityError(
            f"{url}: server states no length, so that a file cut short would look whole; nothing was kept. Use another server."
        )


def _check_room(folder, url, needed):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise errors.CacheError(
            f"{folder.parent}: {url} needs {needed:,} bytes, {free:,} are free; make room or set KERAS_VIT_HOME to another disk."
        )


def _receive(response, file, total):
    """Writes a body where the part stands, each piece at once, so that a kill loses none; returns the part's path."""
    start, name = file.tell(), pathlib.Path(file.name).parent.name.lstrip(".")
    try:
        with tqdm.tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            while piece := _read(response.raw, file.tell() > start):
                file.write(piece)
                file.flush()
                bar.update(len(piece))
        if total is not None and file.tell() != total:
            raise _Fault(f"{file.tell():,} of {total:,} bytes arrived", error=errors.IntegrityError)
    except BaseException as error:
        if isinstance(error, OSError) or not _etag(file.name):  # the disk is full, or the part could not be continued
            pathlib.Path(file.name).unlink(missing_ok=True)
        raise
    return pathlib.Path(file.name)


def _read(raw, some):
    """The next piece of a body, b"" at its end. Silence is worth another try only after `some` bytes of this one."""
    try:
        return raw.read1(_CHUNK)
    except urllib3.exceptions.ReadTimeoutError as error:
        raise _Fault(f"no byte for {READ_TIMEOUT} seconds", again=some) from error
    except urllib3.exceptions.HTTPError as error:
        raise _Fault(f"cut short: {error}", error=errors.IntegrityError) from error
