"""When a finished result is given back, when parts of it are made again, and when it is refused; one run at a time in a folder."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dbes
from dbes.errors import FileError, ResultError, SettingError, TraceError
from dbes.evaluation.request import Request, device_named
from dbes.files import locked
from dbes.results import RESULT_FILE, Result, load_result
from dbes.scoring.tables import COMPANIONS
from dbes.trace.store import MANIFEST, Trace

SETTINGS = {"permutations": 20, "limit": 4}


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Root and folder of a finished result."""
    output = tmp_path_factory.mktemp("finished")
    dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=output, **SETTINGS)
    return output, next(output.rglob(RESULT_FILE)).parent


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    root, folder = finished
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" / folder.relative_to(root)


@pytest.fixture
def again(tiny_checkpoint: Path, tiny_task: Path) -> Any:
    def run(root: Path, **changes: Any) -> tuple[Result, list[str]]:
        stages: list[str] = []
        given = {"tasks": tiny_task, **SETTINGS, **changes}
        model = given.pop("model", tiny_checkpoint)
        result = dbes.evaluate(model, output_path=root, progress=lambda stage, *_: stages.append(stage), **given)
        return result, sorted(set(stages))

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder; of result.json all but when and how fast it was made."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    if RESULT_FILE in found:
        result = Result.model_validate_json(found[RESULT_FILE])
        how = {"seconds", "tokens_per_second", "engine", "bytes_read", "bytes_skipped"}  # of this recording; no trace says it
        found[RESULT_FILE] = result.model_dump_json(exclude={"created": True, "recording": how}).encode()
    return found


def test_a_reused_result_says_so_and_changes_nothing(copied: tuple[Path, Path], again: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, folder = copied
    before = contents(folder)
    with caplog.at_level(logging.WARNING, "dbes"):
        result, stages = again(root)
    assert stages == [] and contents(folder) == before
    assert f"reused, recorded at {result.created}" in caplog.text


def test_the_listing_names_every_companion(finished: tuple[Path, Path]) -> None:
    assert set(load_result(finished[1]).files) == set(COMPANIONS)


@pytest.mark.parametrize(
    ("name", "harm"), [(name, ("missing", "cut short", "altered")[number % 3]) for number, name in enumerate(COMPANIONS)]
)
def test_a_harmed_companion_is_made_again_from_the_routes(
    name: str, harm: str, copied: tuple[Path, Path], again: Any, caplog: pytest.LogCaptureFixture
) -> None:
    root, folder = copied
    before = contents(folder)
    path = folder / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut short" else content[:-1] + bytes([content[-1] ^ 1]))
    _, stages = again(root)
    assert stages == [] and name in caplog.text and "made again from the recorded routes" in caplog.text
    assert contents(folder) == before


def test_without_routes_a_harmed_result_is_recorded_again(copied: tuple[Path, Path], again: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, folder = copied
    before = contents(folder)
    shutil.rmtree(folder / "trace")
    (folder / "scores.csv").unlink()
    _, stages = again(root)
    assert stages == ["recording", "scoring"] and "recorded again" in caplog.text
    assert contents(folder) == before


@pytest.mark.parametrize("harm", ["shard missing", "shard cut short", "control missing a shard", "no manifest", "unfinished"])
def test_harmed_routes_are_recorded_again(harm: str, copied: tuple[Path, Path], again: Any) -> None:
    root, folder = copied
    before = contents(folder)
    trace = folder / "trace"
    shard = next((trace / "control" if "control" in harm else trace).glob("shard-*.safetensors"))
    if harm == "no manifest":
        (trace / MANIFEST).unlink()
    elif harm == "unfinished":
        text = (trace / MANIFEST).read_text()
        (trace / MANIFEST).write_text(text.replace('"complete": true', '"complete": false'))
    elif harm == "shard cut short":
        shard.write_bytes(shard.read_bytes()[:-10])
    else:
        shard.unlink()
    _, stages = again(root)
    assert stages == ["recording", "scoring"]
    assert contents(folder) == before


def test_routes_go_when_they_are_not_wanted_and_their_lack_is_told(
    copied: tuple[Path, Path], again: Any, caplog: pytest.LogCaptureFixture
) -> None:
    root, folder = copied
    assert again(root, save_trace=False)[1] == []
    assert not (folder / "trace").exists() and set(load_result(folder).files) <= {path.name for path in folder.iterdir()}
    assert again(root)[1] == []
    assert "its routes were not kept, --overwrite records them" in caplog.text
    assert again(root, overwrite=True)[1] == ["recording", "scoring"]
    assert (folder / "trace" / MANIFEST).is_file()


def test_what_killed_runs_left_is_removed(copied: tuple[Path, Path], again: Any) -> None:
    root, folder = copied
    before = contents(folder)
    for place in (folder, folder / "trace", folder / "trace" / "control"):
        (place / ".scores.csv.ab12.part").write_text("half")
    (folder / ".trace.xy.part" / "trace").mkdir(parents=True)
    (folder / ".dbes.lock").write_text("process 1 on nowhere")
    again(root)
    assert contents(folder) == before and not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"dtype": "bfloat16"}, "dtype", id="dtype"),
        pytest.param({"batch_size": 3}, "batch_size", id="batch size"),
        pytest.param({"permutations": 19}, "permutations", id="permutations"),
        pytest.param({"seed": 5}, "seed", id="seed"),
        pytest.param({"trust_remote_code": True}, "trust_remote_code", id="remote code"),
    ],
)
def test_another_setting_is_refused_by_name(changes: dict[str, Any], told: str, finished: tuple[Path, Path], again: Any) -> None:
    root, folder = finished
    before = contents(folder)
    with pytest.raises(ResultError, match=f"another {told}; use --overwrite"):
        again(root, **changes)
    assert contents(folder) == before


def test_the_same_in_other_words_is_the_same(finished: tuple[Path, Path], again: Any) -> None:
    from dbes.evaluation.request import accelerator_here

    if accelerator_here() != "cpu":
        pytest.skip("auto is another dtype on an accelerator")
    assert again(finished[0], dtype="float32", device_map="cpu")[1] == []


def test_another_window_of_the_same_task_is_refused(finished: tuple[Path, Path], again: Any, tiny_task: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_task.parent, tmp_path / "task")
    task = tmp_path / "task" / tiny_task.name
    task.write_text(task.read_text().replace("window: 64", "window: 32"))
    with pytest.raises(ResultError, match="task fingerprint"):
        again(finished[0], tasks=task)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        pytest.param("recorded_with_torch", "version of torch", id="torch"),
        pytest.param("recorded_with_transformers", "version of transformers", id="transformers"),
        pytest.param("dbes", "version of dbes that scored", id="dbes"),
        pytest.param("tokenizer_sha256", "tokenizer", id="tokenizer"),
    ],
)
def test_other_software_is_refused_and_its_lack_told(
    field: str, name: str, copied: tuple[Path, Path], again: Any, caplog: pytest.LogCaptureFixture
) -> None:
    root, folder = copied
    content = json.loads((folder / RESULT_FILE).read_text())
    content["environment"][field] = "another"
    (folder / RESULT_FILE).write_text(json.dumps(content))
    with pytest.raises(ResultError, match=f"another {name}; use"):
        again(root)
    del content["environment"][field]
    (folder / RESULT_FILE).write_text(json.dumps(content))
    assert again(root)[1] == []
    assert f"were not compared: {name}" in caplog.text


def test_another_tokenizer_beside_the_same_weights_is_refused(
    finished: tuple[Path, Path], again: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from dbes.models import folder_fingerprint

    model = tmp_path / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, model)
    content = json.loads((model / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (model / "tokenizer.json").write_text(json.dumps(content))
    if folder_fingerprint(model) != folder_fingerprint(tiny_checkpoint):
        return  # then it has a folder of its own
    with pytest.raises(ResultError, match="another tokenizer"):
        again(finished[0], model=model)


def test_an_old_result_without_these_fields_is_reused(copied: tuple[Path, Path], again: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, folder = copied
    content = json.loads((folder / RESULT_FILE).read_text())
    del content["files"]
    for name in ("dtype", "device_map", "trust_remote_code", "embedded_fallback", "model", "tasks", "revision"):
        del content["settings"][name]
    for name in ("accelerator", "tokenizer_sha256"):
        del content["environment"][name]
    (folder / RESULT_FILE).write_text(json.dumps(content))
    assert again(root)[1] == [] and "these were not compared: trust_remote_code" in caplog.text
    with pytest.raises(ResultError, match="another dtype"):
        again(root, dtype="float16")
    (folder / "replicates.safetensors").unlink()
    again(root)
    assert (folder / "replicates.safetensors").is_file() and load_result(folder).files


def test_a_model_in_memory_is_compared_by_what_it_is(finished: tuple[Path, Path], again: Any, tiny_checkpoint: Path) -> None:
    from dbes.models import load_model

    assert again(finished[0], model=load_model(tiny_checkpoint))[1] == []
    with pytest.raises(ResultError, match="another dtype"):
        again(finished[0], model=load_model(tiny_checkpoint, dtype="bfloat16"))


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"dtype": "bfloat16"}, {"seed": 4}], ids=lambda changes: next(iter(changes)))
def test_a_recording_of_something_else_is_not_resumed(changes: dict[str, Any], copied: tuple[Path, Path], again: Any) -> None:
    root, folder = copied
    (folder / RESULT_FILE).unlink()
    with pytest.raises(TraceError, match=f"another {next(iter(changes))}"):
        again(root, **changes)
    unfinished = json.loads((folder / "trace" / MANIFEST).read_text()) | {"complete": False}
    del unfinished["sha256"]  # of what it said before
    (folder / "trace" / MANIFEST).write_text(json.dumps(unfinished))
    with pytest.raises(TraceError, match=f"another {next(iter(changes))}"):
        again(root, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"dtype": "nonsense"}, "no dtype is called 'nonsense'", id="dtype"),
        pytest.param({"dtype": "int8"}, "no dtype is called 'int8'", id="integer dtype"),
        pytest.param({"device_map": "nowhere"}, "device_map 'nowhere'", id="device"),
        pytest.param({"batch_size": 0}, "batch_size 0", id="batch size 0"),
        pytest.param({"batch_size": "many"}, "batch_size 'many'", id="batch size of words"),
        pytest.param({"seed": -1}, "seed -1", id="seed"),
        pytest.param({"permutations": -1}, "permutations -1", id="permutations"),
        pytest.param({"limit": 0}, "limit 0", id="limit"),
        pytest.param({"revision": "main"}, "only models of the hub have revisions", id="revision of a folder"),
    ],
)
def test_impossible_settings_are_refused_before_anything(changes: dict[str, Any], told: str, again: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=told):
        again(tmp_path / "nothing", **changes)
    assert not (tmp_path / "nothing").exists()


def test_devices_by_name() -> None:
    assert device_named(None, "cuda") == device_named("auto", "cuda") == device_named("cuda:1", "cpu") == "cuda"
    assert device_named("cpu", "cuda") == "cpu" and device_named({"": 0}, "cuda") is None


def test_a_request_keeps_what_was_given() -> None:
    request = Request(
        model="m", tasks="t.yaml", revision=None, limit=None, dtype="auto", device_map=None, batch_size="auto", seed=0, permutations=1,
        trust_remote_code=False,
    )  # fmt: skip
    assert (request.settings["model"], request.settings["tasks"]) == ("m", "t.yaml")


def test_a_second_run_is_told_who_writes_here_and_writes_nothing(copied: tuple[Path, Path], again: Any) -> None:
    root, folder = copied
    (folder / RESULT_FILE).unlink()
    with locked(folder):
        before = contents(folder)
        for changes in ({}, {"overwrite": True}):
            with pytest.raises(FileError, match=f"another run is writing here .process {os.getpid()} on"):
                again(root, **changes)
        assert contents(folder) == before


def test_a_finished_result_is_shown_beside_another_run_and_on_a_read_only_disk(
    copied: tuple[Path, Path], again: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dbes.evaluation.reuse

    root, folder = copied
    with locked(folder):
        assert again(root)[1] == []

    def read_only(_: Path) -> Any:
        raise FileError(f"{folder}: cannot be written (Read-only file system)")

    monkeypatch.setattr(dbes.evaluation.reuse, "locked", read_only)
    assert again(root)[1] == [] and again(root, save_trace=False)[1] == []


def test_a_result_that_cannot_be_read_is_left_alone(copied: tuple[Path, Path], again: Any) -> None:
    root, folder = copied
    for content in ('{"schema_version": 2}', "{", ""):
        (folder / RESULT_FILE).write_text(content)
        with pytest.raises(ResultError, match="use --overwrite"):
            again(root)
        assert (folder / RESULT_FILE).read_text() == content
    assert again(root, overwrite=True)[0].status == "ok"


def test_an_interrupted_overwrite_with_fewer_shards_leaves_none_of_the_old(copied: tuple[Path, Path], again: Any) -> None:
    root, folder = copied
    before = contents(folder)
    stray = folder / "trace" / "shard-00007.safetensors"
    for path in ((folder / RESULT_FILE), (folder / "trace" / MANIFEST), (folder / "trace" / "control" / MANIFEST)):
        path.unlink()
    shutil.copy(next((folder / "trace").glob("shard-*")), stray)
    assert again(root)[1] == ["recording", "scoring"]
    assert contents(folder) == before
    assert Trace.load(folder / "trace").tokens > 0


SCRIPT = """
import sys, dbes, dbes.recording.record as recording
recording.SHARD_TOKENS = 400
model, task, output, *flags = sys.argv[1:]
dbes.evaluate(model, tasks=task, output_path=output, permutations=20, batch_size=4,
              overwrite="--overwrite" in flags, save_trace="--no-save-trace" not in flags)
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", SCRIPT, *map(str, arguments)]


def environment(seed: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)}


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    cli = [sys.executable, "-m", "dbes.cli", "evaluate", "--model", str(tiny_checkpoint), "--tasks", str(tiny_task), "--permutations", "20"]
    found = []
    for seed in (1, 2):
        output = tmp_path / str(seed)
        subprocess.run([*cli, "--output-path", str(output)], check=True, env=environment(seed), capture_output=True)
        found.append(contents(next(output.rglob(RESULT_FILE)).parent))
    assert found[0].keys() == found[1].keys() and "report.html" in found[0]
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--no-save-trace",), ("--overwrite", "--no-save-trace")], ids=" ".join)
def test_killed_at_any_moment_the_same_command_ends_the_same(
    flags: tuple[str, ...], tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments of the writing, then the same command: the files of an undisturbed run, and nothing else."""
    whole = tmp_path / "whole"
    first = [flag for flag in flags if flag != "--overwrite"]

    def run(root: Path, *flags: str, cut_after: float | None = None) -> float:
        """Seconds that the run held its folder; it is killed so many seconds after it took it."""
        line = command(tiny_checkpoint, tiny_task, root, *flags)
        with subprocess.Popen(line, env=environment(0), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not list(root.rglob(".dbes.lock")):
                time.sleep(0.002)
            began = time.monotonic()
            if cut_after is not None:
                time.sleep(cut_after)
                process.send_signal(signal.SIGKILL)
            told = process.communicate()[1]
            assert process.returncode in ((0,) if cut_after is None else (0, -signal.SIGKILL)), told
            return time.monotonic() - began

    span = run(whole, *first)
    folder = next(whole.rglob(RESULT_FILE)).parent
    expected = contents(folder)
    moments = random.Random(str(flags))
    for attempt in range(6):
        root = tmp_path / f"cut{attempt}"
        if "--overwrite" in flags:
            shutil.copytree(whole, root)
        run(root, *flags, cut_after=moments.uniform(0, 1.1) * span)
        # an --overwrite that was killed is ended without it as well
        run(root, *(flags if attempt % 2 else first))
        assert contents(root / folder.relative_to(whole)) == expected, f"attempt {attempt}"
