"""Files whole or not at all, one writer of a folder, and what the system refuses in one line."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dbes.errors import FileError
from dbes.files import LOCK, locked, replacing, write_text


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a\.json: cannot be written \(No space left"), replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "below.json", Path("/proc/nothing/a.json")):
        with pytest.raises(FileError, match="cannot be written"):
            write_text(path, "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder: cannot be written"):
        write_text(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


HOLD = """
import sys, time; from pathlib import Path; from dbes.files import locked
with locked(Path(sys.argv[1])):
    print('held', flush=True); time.sleep(60)
"""


def test_the_second_run_learns_who_holds_the_folder_and_a_crash_leaves_no_lock(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(FileError, match=f"process {first.pid} on"), locked(tmp_path):
            pass
        (tmp_path / ".result.json.abc.part").write_text("half")
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))
    assert list(tmp_path.iterdir()) == []


COUNT = """
import sys; from pathlib import Path; from dbes.files import locked; from dbes.errors import FileError
place = Path(sys.argv[1]); done = 0
while done < 40:
    try:
        with locked(place):
            n = int((place / 'n').read_text() or 0); (place / 'n').write_text(str(n + 1)); done += 1
    except FileError: pass
"""


def test_never_two_owners(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("0")
    runs = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(3)]
    deadline = time.time() + 120
    assert all(run.wait(max(1, deadline - time.time())) == 0 for run in runs)
    assert (tmp_path / "n").read_text() == "120"
