"""Atomic writes and locks: kills, permissions to replace, and file systems without exchange or locks."""

import ctypes
import errno
import fcntl
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SMALL, assert_one_line_error, write_bundle

import illama.atomic_write
from illama.atomic_write import (
    file_lock,
    list_folder,
    lock_folder,
    read_pinned,
    remove_folder,
    write_file,
    write_folder,
    write_pinned,
)
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.manifest import Manifest


def anything(folder):
    return True


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_text(folder, text, is_ours=anything):
    with write_folder(folder, is_ours) as draft:
        (draft / "text").write_text(text)


def killed(act):
    """Calls ``act``, which kills its process, in a forked process."""
    if not (child := os.fork()):
        try:
            act()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed_while_writing(place, write=write_folder):
    """Leaves the draft of ``place`` and its lock file."""

    def act():
        with write(place) as draft:
            (draft / "half" if draft.is_dir() else draft).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(act)


def test_a_failed_write_leaves_the_old_bundle(tmp_path):
    folder = write_bundle(tmp_path / "bundle", SMALL)
    before = Manifest.read(folder)
    with pytest.raises(RuntimeError), write_folder(folder) as draft:
        (draft / "manifest.json").write_text("half")
        raise RuntimeError("failed")
    assert Manifest.read(folder) == before
    with pytest.raises(RuntimeError), write_file(folder / "manifest.json") as draft:
        draft.write_text("half")
        raise RuntimeError("failed")
    assert Manifest.read(folder) == before
    assert names(tmp_path) == ["bundle"] and names(folder) == ["manifest.json", "model.safetensors"]


def test_drafts_of_killed_processes_are_removed(tmp_path):
    """Only drafts of the same folder or file are removed."""
    folder, file = write_bundle(tmp_path / "a[b]", SMALL), tmp_path / "checkpoint.pt"
    killed_while_writing(folder)
    killed_while_writing(file, write_file)
    left = names(tmp_path)
    assert len(left) == 5 and list_folder(tmp_path) == [folder]
    others = {".a[b].draft-notes", ".a.draft-0123456789abcdef", "a[b].draft-0123456789abcdef"}
    for name in others:
        (tmp_path / name).touch()
    write_bundle(folder, SMALL)
    with write_file(file) as draft:
        draft.write_text("whole")
    assert set(names(tmp_path)) == {"a[b]", "checkpoint.pt", *others}


def test_drafts_of_earlier_versions_are_removed(tmp_path):
    """Their drafts had the number of a process and no lock; process 1 of a container always seemed to be alive."""
    (tmp_path / ".bundle.draft-1").mkdir()
    (tmp_path / ".checkpoint.pt.draft-1").touch()
    write_bundle(tmp_path / "bundle", SMALL)
    (tmp_path / "bundle").rename(tmp_path / ".bundle.old-1")  # killed between the two renames
    with pytest.raises(RuntimeError), write_folder(tmp_path / "bundle"):
        raise RuntimeError("failed")
    assert load_checkpoint(tmp_path / "bundle").model.config == SMALL
    with write_file(tmp_path / "checkpoint.pt") as draft:
        draft.write_text("whole")
    assert names(tmp_path) == ["bundle", "checkpoint.pt"]


def test_the_content_of_a_folder_without_drafts(tmp_path):
    """Without a known name, files with a number are not drafts and are not removed."""
    mine = {".notes.draft-2", ".thesis.old-2023", "checkpoint.pt"}
    for name in (*mine, ".checkpoint.pt.draft-0123456789abcdef", ".bundle.draft-0123456789abcdef.lock", ".lock"):
        (tmp_path / name).touch()
    assert {path.name for path in list_folder(tmp_path)} == mine
    with pytest.raises(UserError, match="other files"), write_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        assert set(names(tmp_path)) == {*mine, ".lock"}


def test_a_draft_in_use_is_not_removed(tmp_path):
    with write_folder(tmp_path / "out", anything) as first:
        (first / "text").write_text("first")
        write_text(tmp_path / "out", "second")
        assert (first / "text").read_text() == "first"
    assert (tmp_path / "out" / "text").read_text() == "first" and names(tmp_path) == ["out"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="other files"), write_folder(tmp_path):
        pass
    with pytest.raises(UserError, match="other files"), write_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("came meanwhile")
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert names(tmp_path) == ["out", "thesis.tex"] and names(tmp_path / "out") == ["thesis.tex"]


def test_a_mount_point_is_rejected_at_once():
    with pytest.raises(UserError, match="mount point"), write_folder(Path("/proc"), anything):
        pytest.fail("it began to write")


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """Runs a test with the kernel's exchange of two folders and without it."""
    if request.param == "two renames":

        def missing(*_):
            raise OSError(errno.EINVAL, "no exchange here")

        monkeypatch.setattr(illama.atomic_write, "_renameat2", missing)
    return request.param


def test_concurrent_writers_of_a_folder(swap, tmp_path):
    """Readers find a complete result; with an exchange, they find one at any moment."""
    out, seen = tmp_path / "out", set()
    write_text(out, "x" * 1000)
    writing = True

    def read():
        while writing:
            with suppress(FileNotFoundError):  # the folder was replaced while it was read
                seen.add((out / "text").read_text())
            if not out.exists():
                seen.add("nothing")

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(lambda text: [write_text(out, text * 1000) for _ in range(20)], text) for text in "abcd"]
        wait(writers)
        writing = False
    for future in (*writers, reader):
        future.result()
    assert seen - {"nothing"} <= {text * 1000 for text in "abcdx"}
    assert "nothing" not in seen or swap == "two renames"
    assert names(tmp_path) == ["out"] and names(out) == ["text"]


def test_a_folder_is_restored_if_its_replacement_fails(swap, tmp_path):
    out = tmp_path / "out"
    write_text(out, "old")
    with pytest.raises(FileNotFoundError), write_folder(out, anything) as draft:
        draft.rename(tmp_path / "away")
    assert (out / "text").read_text() == "old" and names(tmp_path) == ["away", "out"]


def test_killed_between_two_renames(tmp_path, monkeypatch):
    """Without an exchange, the next write restores the old folder, even if it fails."""
    out = tmp_path / "out"
    write_text(out, "old")

    def kill_between(one, other):
        monkeypatch.setattr(Path, "rename", rename_and_die)
        raise OSError(errno.ENOSYS, "no exchange here")

    def rename_and_die(path, target):
        os.rename(path, target)  # noqa: PTH104
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patches:
        patches.setattr(illama.atomic_write, "_renameat2", kill_between)
        killed(lambda: write_text(out, "new"))
    assert not out.exists()
    with pytest.raises(RuntimeError), write_folder(out, anything):
        raise RuntimeError("failed")
    assert (out / "text").read_text() == "old" and names(tmp_path) == ["out"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="the C library has no renameat2")
def test_the_kernel_exchanges_folders(tmp_path):
    for name in ("one", "other"):
        write_text(tmp_path / name, name)
    illama.atomic_write._renameat2(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "text").read_text() == "other"
    with pytest.raises(FileNotFoundError):
        illama.atomic_write._renameat2(tmp_path / "one", tmp_path / "nowhere")


def test_without_locks_no_draft_is_removed(tmp_path, monkeypatch):
    """On a file system without locks, the writer of a draft may be alive."""
    killed_while_writing(tmp_path / "out")
    left = [path for path in names(tmp_path) if not path.endswith(".lock")]

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    with monkeypatch.context() as patches:
        patches.setattr(fcntl, "flock", unsupported)
        write_text(tmp_path / "out", "whole")
        with lock_folder(tmp_path / "out"), lock_folder(tmp_path / "out"):
            pass
    assert set(left) < set(names(tmp_path))
    write_text(tmp_path / "out", "again")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["text"]


def test_a_folder_in_use_is_rejected(tmp_path):
    out = tmp_path / "run" / "out"
    with lock_folder(out):
        with lock_folder(out, main=False):  # another process of the same run
            pass
        with pytest.raises(UserError, match="in use"), lock_folder(out):
            pass
        with pytest.raises(UserError, match="in use"), write_folder(out):
            pass
        (out / "checkpoint.pt").touch()
        assert list_folder(out) == [out / "checkpoint.pt"]
    assert names(out) == ["checkpoint.pt"]
    with pytest.raises(UserError, match="cannot write"), lock_folder(out / "checkpoint.pt"):
        pass


def test_a_folder_that_is_locked_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with ExitStack() as stack:
        with pytest.raises(UserError, match="in use"), write_folder(out):
            stack.enter_context(lock_folder(out))
        assert names(tmp_path) == ["out"] and names(out) == [".lock"]


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("made", "mine"):
        with pytest.raises(UserError), lock_folder(tmp_path / name):
            raise UserError("a bad option")
    assert names(tmp_path) == ["mine"]


def test_a_lock_is_free_after_its_holder_is_killed_even_if_a_child_is_alive(tmp_path):
    """A data loader's worker is a fork, which ends seconds after a killed parent."""
    read_end, write_end = os.pipe()

    def hold():
        with lock_folder(tmp_path):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            os.write(write_end, str(child).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    killed(hold)
    child = int(os.read(read_end, 20))
    try:
        assert names(tmp_path) == [".lock"]
        with lock_folder(tmp_path):
            pass
        os.kill(child, 0)  # it is alive
    finally:
        os.kill(child, signal.SIGKILL)
    assert names(tmp_path) == []


def test_a_lock_has_one_holder_at_a_time(tmp_path):
    """The lock file is removed with its lock, so a waiting process must notice that its file is gone."""
    inside = []

    def work(number):
        for _ in range(50):
            with file_lock(tmp_path / "lock", wait=True) as held:
                assert held
                inside.append(number)
                assert len(inside) == 1
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert names(tmp_path) == []


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_pinned_file_is_complete_after_a_kill_at_any_step(old, tmp_path, monkeypatch):
    """A file without its SHA-256, or with a wrong one, would be rejected."""
    path, replace = tmp_path / "cache", Path.replace
    for steps in range(3):
        for each in tmp_path.iterdir():
            each.unlink()
        if old is not None:
            write_pinned(path, old)
        left = iter(range(steps))

        def replace_or_die(draft, target, left=left):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(draft, target)

        with monkeypatch.context() as patches:
            patches.setattr(Path, "replace", replace_or_die)
            killed(lambda: write_pinned(path, b"new"))
        assert read_pinned(path) == (b"new" if steps >= 2 else old) and path.exists() == (read_pinned(path) is not None)
        write_pinned(path, b"next")
        assert read_pinned(path) == b"next" and names(tmp_path) == ["cache", "cache.sha256"]
        assert len((tmp_path / "cache.sha256").read_text().splitlines()) == 1


@given(st.binary(max_size=20), st.binary(max_size=20), st.binary(max_size=20))
def test_a_changed_pinned_file_is_rejected(tmp_path_factory, first, second, damage):
    path = tmp_path_factory.mktemp("pinned") / "cache"
    for data in (first, second):
        write_pinned(path, data)
        assert read_pinned(path) == data
    path.write_bytes(damage)
    assert read_pinned(path) == (second if damage == second else None)


def test_a_folder_is_removed_atomically(tmp_path, monkeypatch):
    """A killed removal does not leave a part of the folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "part").touch()
    with monkeypatch.context() as patches:
        patches.setattr(illama.atomic_write.shutil, "rmtree", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        killed(lambda: remove_folder(tmp_path / "work"))
    assert list_folder(tmp_path) == [] and names(tmp_path) != []
    (tmp_path / "work").mkdir()
    remove_folder(tmp_path / "work")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "command",
    [
        ("illama/train.py", "--data", "fashion-mnist"),
        ("illama/train_segmentation.py", "--data", "nowhere"),
        ("quant/qat.py",),
        ("eval/tradeoff.py", "nowhere"),
        ("eval/accuracy.py", "."),
        ("eval/robustness.py", ".", "--data", "."),
    ],
)
def test_two_processes_cannot_use_the_same_folder(command, tmp_path, run_here):
    with lock_folder(tmp_path / "out"):
        assert_one_line_error(run_here(*command, "--out", tmp_path / "out"), "in use")
        assert names(tmp_path / "out") == [".lock"]
