"""Files whole or not at all, one writer of a folder, and what the system refuses in one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from dbes.errors import FileError, refusal
from dbes.files import (
    LOCK,
    check_writable,
    discard,
    is_sealed,
    keep_log_before,
    locked,
    read_bytes,
    regular,
    replacing,
    sorted_metadata,
    write_text,
)


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
import sys; from pathlib import Path; from dbes.files import locked; from dbes.errors import FileError, refusal
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


def test_the_next_writing_of_a_file_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    script = """
import os, signal, sys; from pathlib import Path; from dbes.files import replacing
with replacing(Path(sys.argv[1])) as part:
    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "a.json"
    subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    (tmp_path / ".b.json.ab12.part").write_text("of another file")
    assert len(list(tmp_path.glob(".a.json.*.part"))) == 1
    with replacing(target) as living:
        living.write_text("slow")
        write_text(target, "quick")
        assert living.is_file()
        with locked(tmp_path):
            assert living.is_file() and not (tmp_path / ".b.json.ab12.part").exists()
    assert target.read_text() == "slow" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_litter_that_is_no_file_harms_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.json.ab12.part")
    (tmp_path / ".a.json.cd34.part").symlink_to(tmp_path)
    (tmp_path / ".a.json.ef56.part" / "inner").mkdir(parents=True)
    write_text(tmp_path / "a.json", "x")
    assert (tmp_path / "a.json").read_text() == "x" and not (tmp_path / ".a.json.ef56.part").exists()


def test_a_folder_is_discarded_at_once(tmp_path: Path) -> None:
    (tmp_path / "trace" / "control").mkdir(parents=True)
    (tmp_path / "trace" / "control" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("trace", "link", "nothing"):
        discard(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileError, match="cannot be removed"):
        discard(tmp_path / "file" / "below")


def test_a_place_that_cannot_be_written_to_is_told_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "a.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "a.json", Path("/proc/a.json")):
        with pytest.raises(FileError, match="cannot be written"):
            check_writable(path)


def test_folders_made_for_nothing_go_with_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), locked(tmp_path / "a" / "b"):
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        write_text(tmp_path / "a" / "b" / "kept", "x")
    assert (tmp_path / "a" / "b" / "kept").is_file()


def test_patience_waits_for_the_other(tmp_path: Path) -> None:
    quick = HOLD.replace("60", "1")
    with subprocess.Popen([sys.executable, "-c", quick, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with locked(tmp_path, patience=60):
            assert first.wait(60) == 0


def sealed(content: bytes) -> bytes:
    """As earlier versions sealed the state of a training run of the testbed."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.setdefault("__metadata__", {})["sha256"] = sha256(json.dumps(header, sort_keys=True).encode() + data).hexdigest()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_metadata_are_written_in_order_and_a_seal_holds() -> None:
    arrays = {"b": np.arange(3.0), "a": np.zeros((2, 0), np.int16)}
    metadata = {f"key {number}": "wört\n\x1b" for number in range(20)}
    found = {sorted_metadata(save(arrays, metadata)) for _ in range(5)}
    assert len(found) == 1
    assert {name: array.tolist() for name, array in load(found.pop()).items()} == {"a": [[], []], "b": [0, 1, 2]}
    assert sorted_metadata(save(arrays)) == save(arrays)
    whole = sealed(save(arrays, metadata))
    assert is_sealed(whole) and load(whole)["b"].tolist() == [0, 1, 2]
    for harmed in (whole[:-1], whole[:20], b"", whole.replace(b"key 3", b"key x"), save(arrays, metadata), save(arrays), b"\xff" * 64):
        assert not is_sealed(harmed)


@pytest.mark.parametrize("line", ["half", '{"step": "x"}', "[1]", "{}", "3", '{"loss": 1}'])
def test_a_log_is_kept_up_to_the_first_line_that_is_none(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 0}}\n{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert keep_log_before(path, 9) == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: [enforce fail]"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory: libx.so"),
        (TypeError("I/O error: File too large (os error 27)"), "File too large"),
        (RuntimeError("shapes differ"), None),
        (FileError("told already (os error 28)"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_what_the_system_refused(problem: BaseException, reason: str | None) -> None:
    found = refusal(problem)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to").symlink_to(tmp_path / "pipe")
    expected = {
        tmp_path / "pipe": "pipe, socket or device", tmp_path / "to": "pipe, socket or device", Path("/dev/zero"): "pipe, socket or device",
        tmp_path: "a folder", tmp_path / "loop": "cannot be read", tmp_path / "none": "no such file", tmp_path / "a\0b": "cannot be read",
    }  # fmt: skip
    for path, told in expected.items():
        for read in (read_bytes, regular):
            with pytest.raises(FileError, match=told):
                read(path)
