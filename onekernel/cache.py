"""A small store of compiled kernels on disk, so that a second process need not compile them again.

Compiling a robot's step takes seconds; reading the result back takes milliseconds. `store` keeps a
payload (bytes) under a key (a string that names everything the payload depends on), and `load`
gives it back, in this process or in a later one.

Where: the folder `$ONEKERNEL_CACHE_DIR` if that is set, else `onekernel` in the user's cache folder
(`$XDG_CACHE_HOME` or `~/.cache`; `~/Library/Caches` on macOS, `%LOCALAPPDATA%` on Windows).
`ONEKERNEL_CACHE=0` switches the store off.

What it promises:
- A payload becomes machine code in this process, so whoever can write here can run code here. The
  folder is made for its user alone (mode 0700). A folder, or a file in it, that belongs to another
  user or that others can write to is not used.
- A file that is broken, cut short, of another version or of another key is taken for no file, and
  the next `store` replaces it.
- Processes may use the store at the same time: a file is written beside its final name and then
  renamed, so a reader sees a whole file or none.
- A full disk or a read-only folder is no error. Then nothing is kept, and one warning says why.
- The folder stays below about 1 GiB: what was not used for longest goes first.

A file, all integers little-endian: MAGIC (8 bytes), VERSION (4), SHA-256 of the payload (32), sizes
of key and payload (8 each), the key in UTF-8, the payload.
"""

import contextlib
import hashlib
import json
import os
import stat
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

MAGIC = b"ONEKERNL"
VERSION = 1  # of the file's layout; it says nothing about what a payload means
HEAD = struct.Struct("<8sI32sQQ")
SUFFIX = ".kernel"
UNFINISHED = ".unfinished"  # suffix of a file that is being written
MAX_BYTES = 1 << 30  # of all files together
MAX_UNFINISHED_SECONDS = 3600.0  # after which an unfinished file was left by a process that died

_has_warned = False


def load(key: str) -> bytes | None:
    """The payload that was stored under `key`, or None if there is none that can be trusted.

    key: as given to `store`.
    """
    directory = _usable_folder()
    if directory is None:
        return None
    try:
        content = _read_own_file(_file_of(directory, key))
    except OSError:
        return None
    return _payload_of(content, key)


def store(key: str, payload: bytes) -> None:
    """Keep `payload` under `key`, in place of what was there; do nothing if that is impossible.

    key: any text; name in it everything that the payload depends on.
    payload: bytes, see `pack`. One larger than the whole store may be is not kept.
    """
    directory = _usable_folder()
    if directory is None:
        return
    name = key.encode()
    head = HEAD.pack(MAGIC, VERSION, hashlib.sha256(payload).digest(), len(name), len(payload))
    if len(head) + len(name) + len(payload) > MAX_BYTES:
        return
    try:
        _write_and_rename(_file_of(directory, key), head + name + payload)
        _evict(directory)
    except OSError as error:
        _warn_once(f"onekernel keeps no compiled kernels: {error}")


def pack(header: dict, blobs: list[bytes]) -> bytes:
    """One payload of a description and some raw data, without pickle, which would run code.

    header: what JSON can express, and so comes back from JSON: tuples as lists, keys as strings.
    blobs: any number of byte strings.

    Raises TypeError for a header that JSON cannot express.
    """
    parts = [json.dumps(header).encode(), *blobs]
    sizes = [len(part) for part in parts]
    return b"".join([struct.pack(f"<I{len(parts)}Q", len(parts), *sizes), *parts])


def unpack(payload: bytes) -> tuple[dict, list[bytes]]:
    """The header and the blobs that `pack` was given.

    Raises ValueError if the payload is not of `pack`.
    """
    try:
        (count,) = struct.unpack_from("<I", payload)
        sizes = struct.unpack_from(f"<{count}Q", payload, offset=4)
    except struct.error as error:
        raise ValueError("the payload is cut short") from error
    start = 4 + 8 * count
    if count == 0 or start + sum(sizes) != len(payload):
        raise ValueError("the payload's size is not what it says")
    parts = []
    for size in sizes:
        parts.append(payload[start : start + size])
        start += size
    header = json.loads(parts[0])  # its error is a ValueError, too
    if not isinstance(header, dict):
        raise ValueError("the payload has no header")
    return header, parts[1:]


def folder() -> Path | None:
    """The folder of the store, made or not; None if it is switched off or the user has no home."""
    if os.environ.get("ONEKERNEL_CACHE") == "0":
        return None
    chosen = os.environ.get("ONEKERNEL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        return _user_cache_folder() / "onekernel"
    except RuntimeError:  # the user has no home
        return None


def _user_cache_folder() -> Path:
    """Where programs keep what they can make again. RuntimeError if the user has no home."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the standard says: ignore a relative one
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ".cache"


def _usable_folder() -> Path | None:
    """The folder of the store, made if it was missing; None and a warning if it is unusable."""
    path = folder()
    if path is None:
        return None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        _warn_once(f"onekernel keeps no compiled kernels: {error}")
        return None
    if not _belongs_to_user_alone(status):
        _warn_once(
            f"onekernel keeps no compiled kernels: {path} belongs to another user, or others can "
            "write to it, and so could run code here (chmod 700 helps if the folder is yours)"
        )
        return None
    return path


def _belongs_to_user_alone(status: os.stat_result) -> bool:
    """Whether nobody else can write to it. Windows keeps a user's folders private by itself."""
    if os.name != "posix":
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _file_of(directory: Path, key: str) -> Path:
    return directory / (hashlib.sha256(key.encode()).hexdigest() + SUFFIX)


def _read_own_file(path: Path) -> bytes:
    """The content of a plain file of this user, and note that it was used. OSError if it is none.

    What is checked is the open file, so nobody can swap it between the check and the reading. It is
    opened without waiting, in case it is a pipe, and not through a link.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or not _belongs_to_user_alone(status):
            raise PermissionError(f"{path} is not a file of this user alone")
        content = file.read()
    with contextlib.suppress(OSError):  # in a read-only folder the order of use stays as it is
        os.utime(path)
    return content


def _payload_of(content: bytes, key: str) -> bytes | None:
    """The payload in a file's content, or None if anything about the content is wrong."""
    if len(content) < HEAD.size:
        return None
    magic, version, digest, key_size, payload_size = HEAD.unpack_from(content)
    start = HEAD.size + key_size
    if magic != MAGIC or version != VERSION or len(content) != start + payload_size:
        return None
    if content[HEAD.size : start] != key.encode():
        return None
    payload = content[start:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def _write_and_rename(path: Path, content: bytes) -> None:
    """Write a file, of mode 0600, that appears under its name only when it is whole."""
    descriptor, unfinished = tempfile.mkstemp(suffix=UNFINISHED, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def _evict(directory: Path) -> None:
    """Remove the files used longest ago until the rest fits, and what dead processes left behind.

    The file just stored was used last, and fits by itself, so it stays.
    """
    files = []
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):  # another process may evict as well
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(SUFFIX):
                files.append((status.st_mtime_ns, status.st_size, entry.path))
            elif entry.name.endswith(UNFINISHED):
                if status.st_mtime < time.time() - MAX_UNFINISHED_SECONDS:
                    os.unlink(entry.path)
    excess = sum(size for _, size, _ in files) - MAX_BYTES
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        excess -= size


def _warn_once(message: str) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=3)
