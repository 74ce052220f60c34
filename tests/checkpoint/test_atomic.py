"""Atomic writes: the old file or the complete new one, at every moment."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gptlit.checkpoint.atomic import atomic_folder, atomic_write, atomic_write_text
from gptlit.checkpoint.files import ResumePoint
from gptlit.checkpoint.io import AtomicCheckpointIO


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    """While it is written, the old content stands under the name; afterwards only the new file is there."""
    target = tmp_path / "new folder" / "file"
    atomic_write_text(target, "old")
    with atomic_write(target) as stream:
        stream.write(b"new")
        stream.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["file"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """An OSError names the target and not the temporary file."""
    target = tmp_path / "file"
    atomic_write_text(target, "old")
    with pytest.raises(OSError, match="No space left") as full, atomic_write(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.filename == str(target)
    with pytest.raises(KeyError), atomic_write(target):
        raise KeyError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing: nothing is cleaned up, and the old file is intact."""
    target = tmp_path / "file"
    atomic_write_text(target, "old")
    program = (
        "import os, sys; from gptlit.checkpoint.atomic import atomic_write\n"
        "with atomic_write(sys.argv[1]) as stream:\n"
        "    stream.write(b'new'); stream.flush(); os.kill(os.getpid(), 9)"
    )
    code = subprocess.run([sys.executable, "-c", program, str(target)], check=False).returncode
    assert code == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(list(tmp_path.glob(".*.partial"))) == 1


def test_threads_that_write_the_same_file_do_not_mix_their_bytes(tmp_path: Path) -> None:
    """The last one wins with a complete file."""
    target, barrier = tmp_path / "file", threading.Barrier(4)

    def write(letter: str) -> None:
        with atomic_write(target) as stream:
            barrier.wait()
            stream.write(letter.encode() * 100_000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = target.read_text()
    assert len(content) == 100_000
    assert len(set(content)) == 1


def test_a_folder_appears_complete_and_readable(tmp_path: Path) -> None:
    """A file that a library made private gets the usual permissions; a folder that failed leaves nothing."""
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "sub").mkdir()
        for path in (folder / "weights", folder / "sub" / "more"):
            path.write_bytes(b"1")
            path.chmod(0o600)
        assert not (tmp_path / "model").exists()
    reference = tmp_path / "reference"
    reference.touch()
    for name in ("weights", "sub/more"):
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)
    with pytest.raises(KeyError), atomic_folder(tmp_path / "other"):
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["model", "reference"]


def test_lightning_gets_the_checkpoint_that_was_read_already(tmp_path: Path) -> None:
    """Once, with the optimizer's tensors copied; the second time the file is read, since it may have been replaced."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 2, "optimizer_states": [torch.zeros(2)]}, path)
    moments = torch.ones(2)
    start = ResumePoint(path, {"global_step": 1, "state_dict": {}, "optimizer_states": [moments]}, run_dir=None)
    plugin = AtomicCheckpointIO(start)
    first = plugin.load_checkpoint(str(path))
    assert first["global_step"] == 1
    first["optimizer_states"][0][:] = 5
    assert moments.tolist() == [1, 1]
    assert start.checkpoint == {"global_step": 1}
    assert plugin.load_checkpoint(path)["optimizer_states"][0].tolist() == [0, 0]
