"""Several processes record one task: the same bytes whatever their number, killed at any moment, with one owner of every file."""

from __future__ import annotations

import json
import os
import random
import signal
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
from test_reuse import contents as result_contents

from dbes.errors import FileError, RecordingError, SettingError
from dbes.locks import Held, is_held
from dbes.recording import crew as crews
from dbes.recording import record as recording
from dbes.recording.crew import Crew
from dbes.results import RESULT_FILE, load_result
from dbes.trace.blocks import Block, Work
from dbes.trace.store import Trace

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
        with pytest.raises(RecordingError, match="rank 0: broken"), other.meeting(tmp_path):
            with pytest.raises(ValueError, match="broken"), first.meeting(tmp_path):
                assert not other.reached(0, "waiting")
                raise ValueError("broken")
            other.reached(0, "loading")
        assert not list(tmp_path.iterdir())

    def test_a_process_that_comes_when_the_first_has_failed_already_is_told(self, tmp_path: Path) -> None:
        late, earlier = Crew(1, 2, key="k"), Crew(1, 2, key="k", began=time.time() + 3600)
        with late.meeting(tmp_path):
            with pytest.raises(ValueError, match="broken"), Crew(0, 2, key="k").meeting(tmp_path):
                raise ValueError("broken")
            with pytest.raises(RecordingError, match="rank 0: broken"):
                late.reached(0, "recording")
            # of an earlier start it says nothing
            earlier._folder = late._folder
            assert earlier._read() is None

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


MEMBER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_recording as tests
from dbes.recording.crew import Crew
tests.torch.set_num_threads(1)
tests.recording.SHARD_TOKENS = 200
folder, pause, crew = Path(sys.argv[2]), float(sys.argv[3]), Crew.here()
real = tests.forward.begin_batch
def slowly(*given):
    time.sleep(pause)
    return real(*given)
tests.forward.begin_batch = slowly
with crew.meeting(folder.parent):
    crew.begin(0)
    if crew.first or crew.reached(0, "recording"):
        tests.record("olmoe", tests.written(30), output_path=folder, crew=crew)
    crew.tell("done", folder=folder)
"""


def started(folder: Path, size: int, pause: float = 0.0) -> list[subprocess.Popen[str]]:
    """Processes as a launcher starts them; they share this parent."""
    line = [sys.executable, "-c", MEMBER, str(Path(__file__).parent), str(folder), str(pause)]
    alone = {name: value for name, value in os.environ.items() if name not in LOCAL} | {"OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [subprocess.Popen(line, env=alone | rank, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for rank in ranks]


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(process.returncode, words) for process in processes for words in [process.communicate(timeout=240)[1]]]


@pytest.fixture(scope="module")
def recorded_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone") / "trace"
    assert [code for code, _ in ended(started(folder, 1))] == [0]
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_real_processes_write_what_one_writes(size: int, recorded_alone: dict[str, bytes], tmp_path: Path) -> None:
    found = ended(started(tmp_path / "trace", size, pause=0.05))
    assert [code for code, _ in found] == [0] * size, found
    assert contents(tmp_path / "trace") == recorded_alone and [path.name for path in tmp_path.iterdir()] == ["trace"]
    assert len([name for name in recorded_alone if name.startswith("shard")]) > 3


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "again"), [(0, 1), (1, 3), (1, 2)])
def test_killed_at_a_random_moment_and_started_again_with_another_number(
    victim: int, again: int, recorded_alone: dict[str, bytes], tmp_path: Path
) -> None:
    folder, moment = tmp_path / "trace", random.Random(victim + 10 * again)
    processes = started(folder, 2, pause=0.3)
    while not list(folder.glob("units/*.lock")):
        assert processes[0].poll() is None
        time.sleep(0.01)
    time.sleep(moment.uniform(0, 1.5))
    processes[victim].send_signal(signal.SIGKILL)
    found = ended(processes)
    assert found[victim][0] in (0, -signal.SIGKILL)
    code, words = found[1 - victim]
    if found[victim][0] != 0:
        owner = "rank 0 ended without a word" if victim == 0 else "rank 1, process "
        assert code == 0 or owner in words, words
    if not json.loads((folder / "manifest.json").read_text())["complete"]:  # else all of it was done
        found = ended(started(folder, again))
        assert [code for code, _ in found] == [0] * again, found
    assert contents(folder) == recorded_alone


SHARDS = """
import sys, dbes.recording.record as recording
recording.SHARD_TOKENS = 1500
from dbes.cli import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(launcher: str, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    options = ["evaluate", "--model", str(tiny_checkpoint), "--tasks", str(tiny_task), "--permutations", "20", "--batch-size", "4"]
    environment = {name: value for name, value in os.environ.items() if name not in LOCAL} | {"OMP_NUM_THREADS": "1"}
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    tools = Path(sys.executable).parent
    if launcher == "torchrun":  # as users call it: the small task is one unit
        alone, lines = ["-m", "dbes.cli"], [str(tools / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "dbes.cli"]
    else:
        # with --cpu accelerate starts one process alone
        alone, lines = [str(script)], [str(tools / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", str(script)]
    found = []
    for name, line in (("alone", [sys.executable, *alone]), ("crew", lines)):
        done = subprocess.run(
            [*line, *options, "--output-path", str(tmp_path / name)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("Written:") == 1
        found.append(result_contents(next((tmp_path / name).rglob(RESULT_FILE)).parent))
    assert found[0].keys() == found[1].keys() and [name for name in found[0] if found[0][name] != found[1][name]] == []
    assert launcher == "torchrun" or len([name for name in found[0] if name.startswith("trace/shard")]) > 3


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=" ".join)
def test_of_two_started_by_hand_the_second_is_refused(
    flags: tuple[str, ...], tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
) -> None:
    asked = ["--model", str(tiny_checkpoint), "--tasks", str(tiny_task), "--permutations", "20", "--output-path", str(tmp_path)]
    line = [sys.executable, "-m", "dbes.cli", "evaluate", *asked, *flags]
    environment = {name: value for name, value in os.environ.items() if name not in LOCAL} | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    found = ended([subprocess.Popen(line, env=environment, **quiet) for _ in range(2)])
    for code, words in found:
        assert code == 0 or "another run is writing here" in words, words
    assert 0 in [code for code, _ in found]
    folder = next(tmp_path.rglob(RESULT_FILE)).parent
    assert load_result(folder).status == "ok" and Trace.load(folder / "trace").tokens > 0 and not list(folder.rglob(".*"))
