"""The key file: made once, and refused wherever somebody else could know or choose it."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kv.auth import AuthKeyError, load_key, require_explicit_key


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[..., Path]:
    def make(content: bytes = b"k" * 32, mode: int = 0o600) -> Path:
        path = tmp_path / "key"
        path.write_bytes(content)
        path.chmod(mode)
        return path

    return make


def test_the_key_is_made_on_first_use_and_stays(tmp_path: Path) -> None:
    cache = tmp_path / "a" / "cache"
    key = load_key(None, cache_dir=cache)
    made = cache / "kv-auth-key"
    assert len(key) == 32 and made.read_bytes() == key
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert load_key(None, cache_dir=cache) == key
    assert os.listdir(cache) == ["kv-auth-key"], "no draft stays behind"


def test_the_key_is_secret_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        load_key(None, cache_dir=tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "kv-auth-key").stat().st_mode) == 0o600


def test_two_users_have_two_keys(tmp_path: Path) -> None:
    assert load_key(None, cache_dir=tmp_path / "a") != load_key(None, cache_dir=tmp_path / "b")


def test_servers_that_start_at_once_have_one_key(tmp_path: Path) -> None:
    gate = threading.Barrier(8)
    keys: list[bytes] = []

    def start() -> None:
        gate.wait()
        keys.append(load_key(None, cache_dir=tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1


def test_one_who_made_the_key_meanwhile_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our look and our link another server links its key."""
    link = os.link

    def slow_link(draft: Path, path: Path) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"o" * 32)
        other.chmod(0o600)
        link(other, path)
        other.unlink()
        link(draft, path)

    monkeypatch.setattr(os, "link", slow_link)
    assert load_key(None, cache_dir=tmp_path) == b"o" * 32
    assert os.listdir(tmp_path) == ["kv-auth-key"]


def test_processes_of_one_user_read_one_key(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kv.auth import load_key; "
        "print(load_key(None, cache_dir=Path(sys.argv[1])).hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    keys = {child.communicate(timeout=60)[0].strip() for child in children}
    assert keys == {load_key(None, cache_dir=tmp_path).hex()}


def test_a_named_key_is_read_and_never_made(tmp_path: Path, key_file: Callable[..., Path]) -> None:
    assert load_key(key_file(b"0123456789abcdef"), cache_dir=tmp_path / "none") == b"0123456789abcdef"
    assert not (tmp_path / "none").exists()
    with pytest.raises(AuthKeyError, match="No such file"):
        load_key(tmp_path / "absent", cache_dir=tmp_path)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666, 0o610])
def test_a_key_that_others_may_use_is_refused(mode: int, key_file: Callable[..., Path]) -> None:
    path = key_file(mode=mode)
    with pytest.raises(AuthKeyError, match="others may use") as refused:
        load_key(path, cache_dir=path.parent)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [0, 1, 15, 4097])
def test_a_key_of_a_wrong_length_is_refused(size: int, key_file: Callable[..., Path]) -> None:
    path = key_file(b"k" * size)
    with pytest.raises(AuthKeyError, match="16 to 4096 bytes"):
        load_key(path, cache_dir=path.parent)


def test_a_link_a_folder_and_a_pipe_are_no_keys(tmp_path: Path, key_file: Callable[..., Path]) -> None:
    link = tmp_path / "link"
    link.symlink_to(key_file())
    with pytest.raises(AuthKeyError, match="symbolic link"):
        load_key(link, cache_dir=tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(AuthKeyError, match="not a regular file"):
        load_key(folder, cache_dir=tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(AuthKeyError, match="not a regular file"):
        load_key(pipe, cache_dir=tmp_path)


def test_a_planted_link_in_the_cache_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kv-auth-key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuthKeyError, match="symbolic link"):
        load_key(None, cache_dir=tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_the_key_of_another_user_is_refused(
    key_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_file()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(AuthKeyError, match="another user"):
        load_key(path, cache_dir=path.parent)


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AuthKeyError, match="cannot make the key file") as refused:
        load_key(None, cache_dir=tmp_path / "file")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_this_machine_alone_needs_no_named_key(host: str) -> None:
    require_explicit_key(host, explicit=False)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.7", "prefill.example", "localhost.evil.example"]
)
def test_whom_other_machines_reach_needs_a_named_key(host: str) -> None:
    with pytest.raises(AuthKeyError, match="--kv-auth-key-file"):
        require_explicit_key(host, explicit=False)
    require_explicit_key(host, explicit=True)
