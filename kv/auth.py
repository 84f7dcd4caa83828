"""The key that two engines must share to trust each other. Reads and makes files."""

import contextlib
import ipaddress
import os
import stat
from pathlib import Path

KEY_NAME = "kv-auth-key"
KEY_BYTES = 32
MIN_KEY_BYTES = 16
MAX_KEY_BYTES = 4096


class AuthKeyError(ValueError):
    """A key that cannot be trusted or is missing; the message is one line."""


def load_key(path: Path | None, *, cache_dir: Path) -> bytes:
    """The key of the side channel and of sealed parameters.

    Args:
        path: of `--kv-auth-key-file`; None: a file in `cache_dir`, made on first use, so that all servers of
            one user have one key.
        cache_dir: of this user.

    Raises:
        AuthKeyError: no such file, others may read it, it is not ours, not a regular file, or too short.
    """
    if path is not None:
        return _read(path)
    path = cache_dir / KEY_NAME
    try:
        if not os.path.lexists(path):
            _make(path)
    except OSError as error:
        raise AuthKeyError(f"cannot make the key file {path}: {error.strerror}") from None
    return _read(path)


def require_explicit_key(host: str, explicit: bool) -> None:
    """Whom other machines can reach has a key that somebody chose to share with them.

    Raises:
        AuthKeyError: `host` is not this machine alone and no key file was named.
    """
    if not explicit and not is_loopback(host):
        raise AuthKeyError(
            f"the side channel on {host!r} can be reached from other machines: name a key with "
            "--kv-auth-key-file, the same on all engines"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # A name: what it means can change, so it is not asked for.


def _make(path: Path) -> None:
    """Makes the file whole or not at all. If another process was first, its file stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(8).hex()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


def _read(path: Path) -> bytes:
    try:
        # Non-blocking: a named pipe in its place must not hold up the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise AuthKeyError(f"cannot open the key file {path}: {reason}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AuthKeyError(f"the key file {path} is not a regular file")
        if status.st_uid != os.geteuid():
            raise AuthKeyError(f"the key file {path} belongs to another user")
        if status.st_mode & 0o077:
            raise AuthKeyError(f"others may use the key file {path}: chmod 600 it")
        key = os.read(descriptor, MAX_KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise AuthKeyError(f"the key file {path} must hold {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes")
    return key
