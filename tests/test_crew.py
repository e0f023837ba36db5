"""Several processes record one task: the same bytes whatever their number, killed at any moment, with one owner of every file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_engines import Scripted, scripted, told
from test_recording import contents

from dbes.errors import FileError, RecordingError, SettingError
from dbes.locks import Held, is_held
from dbes.recording import crew as crews
from dbes.recording import record as recording
from dbes.recording.crew import Crew
from dbes.trace.blocks import Block, Work

LOCAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_rank_and_size_are_what_the_launcher_says() -> None:
    assert (Crew.here({}).rank, Crew.here({}).size) == (0, 1)
    given = Crew.here({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (given.rank, given.size, given.local_rank, given.first) == (3, 4, 1, False)
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}):
        with pytest.raises(SettingError, match="expected a RANK below WORLD_SIZE"):
            Crew.here(wrong)
    with pytest.raises(SettingError, match="each of 4 processes has a device of its own"):
        given.check("auto")
    given.check("cpu")
    Crew.here({}).check("auto")


class TestLocks:
    def test_held_by_one_and_free_when_given_back(self, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        assert not is_held(path)
        first = Held.take(path, "one")
        assert first is not None and first.before == "" and is_held(path) and Held.take(path, "two") is None
        first.add(", more")
        first.release()
        first.release()
        assert not is_held(path)
        second = Held.take(path, "two")
        assert second is not None and second.before == "one, more" and path.read_text() == "two"
        second.release()
        assert Held.take(tmp_path / "missing" / "lock", "") is None

    def test_a_killed_process_holds_nothing(self, tmp_path: Path) -> None:
        script = (
            "import sys, time; from pathlib import Path; from dbes.locks import Held\n"
            "held = Held.take(Path(sys.argv[1]), 'me'); time.sleep(60)"
        )
        path = tmp_path / "lock"
        with subprocess.Popen([sys.executable, "-c", script, str(path)]) as process:
            while not (path.is_file() and path.read_text() == "me"):
                time.sleep(0.01)
            assert is_held(path)
            process.kill()
        assert not is_held(path) and path.read_text() == "me"


def together(folder: Path, engines: Sequence[Scripted], members: Sequence[Crew]) -> list[BaseException | None]:
    """Record with several crew members at once, each in a thread; what each failed of."""
    failed: list[BaseException | None] = [None] * len(members)

    def run(place: int) -> None:
        try:
            with members[place].meeting(folder):
                members[place].begin(0)
                if members[place].first or members[place].reached(0, "recording"):
                    told(engines[place], folder / "trace", crew=members[place])
                members[place].tell("done", folder=folder)
        except BaseException as problem:
            failed[place] = problem

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def slow(block: Block) -> Block:
    time.sleep(0.05)
    return block


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_processes_writes_the_same_bytes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 20)
    told(scripted(), tmp_path / "whole")
    engines = [scripted(lie=slow) for _ in range(size)]
    assert together(tmp_path / "crew", engines, [Crew(rank, size, key="k") for rank in range(size)]) == [None] * size
    assert contents(tmp_path / "crew" / "trace") == contents(tmp_path / "whole")
    assert sorted(first for engine in engines for first in engine.asked) == sorted({first for engine in engines for first in engine.asked})
    assert sum(len(engine.asked) for engine in engines) == 4  # every unit once
    assert [path.name for path in (tmp_path / "crew").iterdir()] == ["trace"], "a meeting was left"


def test_a_process_that_fails_is_named_and_the_others_units_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 20)
    told(scripted(), tmp_path / "whole")

    def fails(_: Block) -> Any:
        time.sleep(0.3)
        raise ValueError("no more")

    engines = [scripted(lie=slow), scripted(lie=fails)]
    found = together(tmp_path / "crew", engines, [Crew(rank, 2, key="k") for rank in range(2)])
    assert isinstance(found[1], ValueError) and isinstance(found[0], RecordingError)
    assert "rank 1, process" in str(found[0]) and "(no more): ended without finishing work unit" in str(found[0])
    again = [scripted(lie=slow) for _ in range(3)]
    assert together(tmp_path / "crew", again, [Crew(rank, 3, key="k") for rank in range(3)]) == [None] * 3
    assert contents(tmp_path / "crew" / "trace") == contents(tmp_path / "whole")
    assert sum(len(engine.asked) for engine in again) == 4 - len(engines[0].asked)


def test_a_damaged_shard_of_another_process_is_found_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 20)
    told(scripted(), tmp_path / "whole")

    class Last(Scripted):
        def blocks(self, work: Work) -> Iterator[Block]:
            while work.first < 4 and not (tmp_path / "crew" / "trace" / "units" / "unit-00003.json").exists():
                time.sleep(0.01)
            for path in (tmp_path / "crew" / "trace").glob("shard-00003*"):
                path.write_bytes(path.read_bytes()[:-1] + b"?")
            yield from super().blocks(work)

    first = Last(scripted().documents, scripted().order)
    found = together(tmp_path / "crew", [first, scripted()], [Crew(rank, 2, key="k") for rank in range(2)])
    assert isinstance(found[0], Exception) and "is not as the process that recorded it says" in str(found[0])
    assert not json.loads((tmp_path / "crew" / "trace" / "manifest.json").read_text())["complete"]
    told(scripted(), tmp_path / "crew" / "trace")
    assert contents(tmp_path / "crew" / "trace") == contents(tmp_path / "whole")


def test_who_is_not_first_never_begins_a_recording(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="holds no recording"):
        told(scripted(), tmp_path / "trace", crew=Crew(1, 2, key="k"))
    assert not (tmp_path / "trace").exists()


class TestMeeting:
    def test_a_first_process_that_dies_or_never_comes_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(crews, "PATIENCE", 0.3)
        other = Crew(1, 2, key="k")
        with other.meeting(tmp_path), pytest.raises(RecordingError, match="rank 0 did not begin within"):
            other.reached(0, "recording")
        folder = tmp_path / f"{crews.MEETING}k"
        folder.mkdir()
        held = Held.take(folder / "first", "")
        assert held is not None
        (folder / "state.json").write_text('{"schema_version": 1, "launch": "x", "stage": "loading"}')
        other = Crew(1, 2, key="k")
        with other.meeting(tmp_path):
            assert other.reached(0, "loading")
            held.release()
            with pytest.raises(RecordingError, match="rank 0 ended without a word"):
                other.reached(0, "recording")

    def test_the_failure_of_the_first_is_that_of_all(self, tmp_path: Path) -> None:
        first, other = Crew(0, 2, key="k"), Crew(1, 2, key="k")
        with pytest.raises(ValueError, match="broken"), first.meeting(tmp_path):
            raise ValueError("broken")
        with pytest.raises(RecordingError, match="rank 0: broken"), other.meeting(tmp_path):
            other.reached(0, "loading")
        assert not list(tmp_path.iterdir())

    def test_two_that_say_they_are_first(self, tmp_path: Path) -> None:
        again = pytest.raises(FileError, match="another process says it has rank 0")
        with Crew(0, 2, key="k").meeting(tmp_path), again, Crew(0, 2, key="k").meeting(tmp_path):
            pass

    def test_what_killed_processes_left_is_taken_away_after_a_while(self, tmp_path: Path) -> None:
        for name, age in (("old", 2 * crews.STALE), ("new", 0.0)):
            folder = tmp_path / f"{crews.MEETING}{name}"
            folder.mkdir()
            os.utime(folder, (time.time() - age,) * 2)
        with Crew(0, 2, key="k").meeting(tmp_path):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{crews.MEETING}k", f"{crews.MEETING}new"]
