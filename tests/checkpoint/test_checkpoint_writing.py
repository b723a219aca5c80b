"""Writing: the old file or the new one, whole, whatever happens in between."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cctool.base.errors import CheckpointError
from cctool.checkpoint import checkpoint as checkpoint_module
from cctool.checkpoint.checkpoint import load, save
from cctool.checkpoint.file.atomic import write_atomically
from cctool.checkpoint.file.checksum import verify_checksum
from checkpoint_toys import STEP, TABLES, make

TOYS = Path(__file__).parents[1] / "toys"


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*.cctool-tmp"))


def test_an_existing_file_is_kept_without_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(make(), path, TABLES)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"exists already; --force"):
        save(make(seed=1), path, TABLES)
    assert path.read_bytes() == before
    save(make(seed=1), path, TABLES, overwrite=True)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def write(stream: object) -> None:
        path.write_bytes(b"someone was faster")

    with pytest.raises(CheckpointError, match="exists already"):
        write_atomically(path, write, overwrite=False)
    assert path.read_bytes() == b"someone was faster"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder .*/no does not exist; create it first"):
        save(make(), tmp_path / "no" / "a.pt", TABLES)


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    for overwrite in (False, True):
        with pytest.raises(CheckpointError):
            save(make(), tmp_path / "a.pt", TABLES, overwrite=overwrite)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.pt").symlink_to(tmp_path / "real" / "b.pt")
    save(make(), tmp_path / "a.pt", TABLES, overwrite=True)
    assert (tmp_path / "a.pt").is_symlink()
    load(tmp_path / "real" / "b.pt", TABLES)
    assert not temporaries(tmp_path)
    assert not temporaries(tmp_path / "real")


def test_long_and_foreign_names(tmp_path: Path) -> None:
    for name in ("x" * 250 + ".pt", "ü" * 120 + ".pt", "a b'c\".pt"):
        save(make(), tmp_path / name, TABLES)
        load(tmp_path / name, TABLES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot write"):
        save(make(), tmp_path / "a.pt", TABLES)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_read_back_wrong_gets_no_name(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lies: the writer's bytes are flipped on their way."""
    path = tmp_path / "a.pt"
    if overwrite:
        save(make(), path, TABLES)
    before = path.read_bytes() if overwrite else None
    writer = checkpoint_module._WRITERS[".pt"]

    def lying(payload, stream) -> None:  # type: ignore[no-untyped-def]
        writer(payload, stream)
        stream.seek(2000)
        stream.write(b"\xff\x00\xff")

    monkeypatch.setitem(checkpoint_module._WRITERS, ".pt", lying)
    with pytest.raises(CheckpointError):
        save(make(seed=1), path, TABLES, overwrite=overwrite)
    assert (path.read_bytes() if path.exists() else None) == before
    assert not temporaries(tmp_path)


@pytest.mark.parametrize(
    "failure", [ValueError("odd"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failure_leaves_nothing(failure: BaseException, tmp_path: Path) -> None:
    def write(stream: object) -> None:
        raise failure

    with pytest.raises((type(failure), CheckpointError)) as caught:
        write_atomically(tmp_path / "a.pt", write)
    assert not list(tmp_path.iterdir())
    if isinstance(failure, OSError):
        assert "the disk is full" in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk(suffix: str, small_disk: Path) -> None:
    path = small_disk / f"a{suffix}"
    save(make(), path, TABLES)
    before = path.read_bytes()
    for width in (2000, 20_000):
        with pytest.raises(CheckpointError, match=r"the disk is full; nothing was left") as caught:
            save(make(width=width), path, TABLES, overwrite=True)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before
        assert list(small_disk.iterdir()) == [path]


def start_saving(path: Path, width: int) -> subprocess.Popen[bytes]:
    """A process that saves a network of about 4 * width ** 2 bytes over and over, telling of each."""
    script = f"""
import sys; sys.path.insert(0, {str(TOYS)!r})
from checkpoint_toys import TABLES, make
from cctool.checkpoint.checkpoint import save
checkpoint = make("stack", width={width})
print("ready", flush=True)
while True:
    sys.stdin.readline()
    print("begin", flush=True)
    save(checkpoint, {str(path)!r}, TABLES, overwrite=True)
    print("end", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def kill_during_saves(path: Path, width: int, kills: int) -> int:
    """Kill a saving process ``kills`` times at moments spread over a save; how many fell inside one."""
    inside = 0
    duration = 0.0
    for kill in range(-1, kills):
        process = start_saving(path, width)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"begin\n"
        start = time.monotonic()
        if kill < 0:
            # The first save is left to end, to know how long one takes.
            assert process.stdout.readline() == b"end\n"
            duration = time.monotonic() - start
            process.kill()
            path.unlink()
        else:
            time.sleep(duration * 0.9 * kill / kills)
            process.send_signal(signal.SIGKILL)
            inside += process.stdout.read() == b""
        process.wait()
        process.stdin.close()
        process.stdout.close()
        if path.exists():
            assert load(path, TABLES).model[0].weight.shape == (width, width)
            if kill % 2:
                path.unlink()
    return inside


def test_a_few_kills(tmp_path: Path) -> None:
    kill_during_saves(tmp_path / "a.pt", width=500, kills=3)
    save(make(), tmp_path / "b.pt", TABLES)
    assert not temporaries(tmp_path), "a later save removes what the dead left behind"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_fifty_kills_while_200_megabytes_are_saved(suffix: str, tmp_path: Path) -> None:
    inside = kill_during_saves(tmp_path / f"a{suffix}", width=7072, kills=50)
    assert inside >= 30
    save(make(), tmp_path / "b.pt", TABLES)
    assert not temporaries(tmp_path)


def test_temporary_files_of_the_living_stay(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def write(stream) -> None:  # type: ignore[no-untyped-def]
        stream.write(b"slow")
        inside.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=write_atomically, args=(tmp_path / "slow.pt", write))
    thread.start()
    assert inside.wait(60)
    stale = tmp_path / ".dead.cctool-tmp"
    stale.touch()
    save(make(), tmp_path / "a.pt", TABLES)
    assert not stale.exists()
    assert len(temporaries(tmp_path)) == 1
    go_on.set()
    thread.join()
    assert (tmp_path / "slow.pt").read_bytes() == b"slow"
    assert not temporaries(tmp_path)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a.pt", tmp_path / "b.pt"
    save(make(seed=1), path, TABLES)
    save(make(seed=2, width=8), other, TABLES)
    wanted = load(other, TABLES).model.fc.weight
    looks = []

    def replaced_after(found: Path) -> tuple[str, bool]:
        looks.append(found)
        outcome = verify_checksum(found)
        if len(looks) == 1:
            other.replace(path)
        return outcome

    monkeypatch.setattr(checkpoint_module, "verify_checksum", replaced_after)
    loaded = load(path, TABLES)
    assert len(looks) == 2
    assert torch.equal(loaded.model.fc.weight, wanted)
    assert loaded.origin is not None
    assert loaded.origin.file == hashlib.sha256(path.read_bytes()).hexdigest()


def test_concurrent_savers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    failures: list[BaseException] = []
    checkpoints = [replace(make(seed=index), history=(STEP,) * index) for index in range(4)]

    def work(index: int) -> None:
        try:
            for _ in range(5):
                save(checkpoints[index], path, TABLES, overwrite=True)
                assert load(path, TABLES).model.fc.weight.shape == (3, 4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    last = load(path, TABLES)
    assert torch.equal(last.model.fc.weight, checkpoints[len(last.history)].model.fc.weight)
    assert list(tmp_path.iterdir()) == [path]
