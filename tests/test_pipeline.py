"""evaluate() end to end on a tiny checkpoint: what is written, reused, resumed, refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rounding import assert_same_routes
from safetensors.numpy import load_file

import dbes
from dbes.errors import DbesError, ModelError, ResultError, TaskError, TraceError
from dbes.evaluation.request import result_folder
from dbes.results import RESULT_FILE, Result, load_result
from dbes.trace.store import Trace

SETTINGS = {"permutations": 50}


@pytest.fixture(scope="module")
def evaluated(tiny_checkpoint: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    output = tmp_path_factory.mktemp("results")
    result = dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=output, **SETTINGS)
    return result, next(output.rglob(RESULT_FILE)).parent


def comparable(result: Result) -> dict:
    """All of a result but when, how fast and by which engine it was recorded, which no trace says."""
    how = {"seconds", "tokens_per_second", "engine", "bytes_read", "bytes_skipped"}
    return json.loads(result.model_dump_json(exclude={"created": True, "recording": how}))


def copy_without(folder: Path, target: Path, *names: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names))
    return target


class TestWritten:
    def test_path_is_model_revision_task(self, evaluated: tuple[Result, Path]) -> None:
        result, folder = evaluated
        assert folder.parts[-3:] == ("tiny-olmoe", str(result.model.revision).removeprefix("sha256:")[:12], "tiny")

    def test_result_on_disk_is_the_result_returned(self, evaluated: tuple[Result, Path]) -> None:
        result, folder = evaluated
        assert comparable(load_result(folder)) == comparable(result)
        json.loads((folder / RESULT_FILE).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    def test_facts(self, evaluated: tuple[Result, Path]) -> None:
        result, _ = evaluated
        assert result.status == "ok"
        assert (result.model.layers, result.model.experts, result.model.top_k) == ((0, 1, 2), (8, 8, 8), (2, 2, 2))
        assert {domain: facts.documents for domain, facts in result.task.domains.items()} == {"law": 12, "code": 12, "math": 12}
        assert result.recording is not None
        assert result.recording.tokens == sum(facts.tokens for facts in result.task.domains.values())

    def test_tables_hold_the_result(self, evaluated: tuple[Result, Path]) -> None:
        result, folder = evaluated
        scores = pd.read_parquet(folder / "scores.parquet")
        assert len(scores) == len(result.calibrated) == len(pd.read_csv(folder / "scores.csv"))
        usage = pd.read_parquet(folder / "expert_usage.parquet")
        assert len(usage) == 3 * 3 * 8
        for domain, facts in result.task.domains.items():
            rows = usage[(usage.domain == domain) & (usage.layer == 1)]
            assert rows.hits.sum() == 2 * facts.tokens
            np.testing.assert_allclose(rows.token_share.sum(), 2)
            np.testing.assert_allclose(rows[["share", "mass_share"]].sum(), 1)

    def test_matrices(self, evaluated: tuple[Result, Path]) -> None:
        result, folder = evaluated
        arrays = load_file(folder / "matrices.safetensors")
        assert result.recording is not None
        tokens = result.recording.tokens
        assert arrays["coactivation"].shape == (3, 8, 8)
        np.testing.assert_array_equal(np.trace(arrays["coactivation"], axis1=1, axis2=2), 2 * tokens)
        np.testing.assert_allclose(arrays["transitions"].sum(axis=(1, 2)), tokens)

    def test_trace_scores_to_the_same_result(self, evaluated: tuple[Result, Path]) -> None:
        result, folder = evaluated
        again = dbes.score(dbes.Trace.load(folder / "trace"), permutations=50)
        assert [record.model_dump_json() for record in again.calibrated] == [record.model_dump_json() for record in result.calibrated]

    def test_nothing_temporary_is_left(self, evaluated: tuple[Result, Path]) -> None:
        _, folder = evaluated
        assert not list(folder.rglob("*.part"))


class TestReuse:
    def test_finished_result_is_reused(self, evaluated: tuple[Result, Path], tiny_checkpoint: Path, tiny_task: Path) -> None:
        result, folder = evaluated
        before = (folder / RESULT_FILE).stat().st_mtime_ns
        again = dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=folder.parents[2], **SETTINGS)
        assert again.created == result.created
        assert (folder / RESULT_FILE).stat().st_mtime_ns == before

    def test_other_settings_are_refused(self, evaluated: tuple[Result, Path], tiny_checkpoint: Path, tiny_task: Path) -> None:
        _, folder = evaluated
        with pytest.raises(ResultError, match="another seed; use --overwrite"):
            dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=folder.parents[2], seed=1, **SETTINGS)

    def test_overwrite_makes_it_again(self, evaluated: tuple[Result, Path], tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
        result, folder = evaluated
        shutil.copytree(folder.parents[2], tmp_path, dirs_exist_ok=True)
        again = dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path, overwrite=True, save_trace=False, **SETTINGS)
        assert comparable(again) == comparable(result)
        copied = next(tmp_path.rglob(RESULT_FILE)).parent
        assert not (copied / "trace").exists()

    def test_recording_finished_but_not_scored_is_not_recorded_again(
        self, evaluated: tuple[Result, Path], tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
    ) -> None:
        result, folder = evaluated
        copy_without(folder.parents[2], tmp_path / "copy", RESULT_FILE)
        stages: list[str] = []
        again = dbes.evaluate(
            tiny_checkpoint, tasks=tiny_task, output_path=tmp_path / "copy", progress=lambda stage, *_: stages.append(stage), **SETTINGS
        )
        assert stages == ["scoring"]
        assert comparable(again) == comparable(result)

    def test_limit_stands_apart(self, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
        result = dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path, limit=4, permutations=10)
        assert result.recording is not None
        assert result.recording.documents == 12
        assert next(tmp_path.rglob(RESULT_FILE)).parent.name == "tiny-limit4"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_changes_no_count(
    batch_size: int, evaluated: tuple[Result, Path], tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
) -> None:
    result, folder = evaluated
    again = dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path, batch_size=batch_size, **SETTINGS)
    (other,) = tmp_path.rglob("trace")
    assert_same_routes(Trace.load(folder / "trace"), Trace.load(other))
    assert again.record("specialization").value == pytest.approx(result.record("specialization").value, rel=1e-3)


@pytest.mark.slow  # recording alone: test_recording
def test_killed_recording_goes_on_and_ends_the_same(tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the recording, with shards made small so that there are several."""
    script = (
        "import sys, time, dbes, dbes.recording.record as recording\n"
        "recording.SHARD_TOKENS = 1500\n"
        "slow = lambda stage, done, total: time.sleep(float(sys.argv[3]))\n"
        f"dbes.evaluate({str(tiny_checkpoint)!r}, tasks={str(tiny_task)!r}, output_path=sys.argv[1], permutations=50,"
        " batch_size=int(sys.argv[2]), progress=slow)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(folder: Path, wait: float) -> list[str]:
        return [sys.executable, "-c", script, str(folder), "4", str(wait)]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole, 0), check=True, env=environment, capture_output=True)
    with subprocess.Popen(command(cut, 0.2), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as victim:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(list(cut.rglob("trace/shard-*.safetensors"))) < 3:
            assert victim.poll() is None, "the victim ended before it was killed"
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
    assert not list(cut.rglob(RESULT_FILE))
    done = len(list(cut.rglob("trace/shard-*.safetensors")))
    subprocess.run(command(cut, 0), check=True, env=environment, capture_output=True)
    shards = {path.name: path.read_bytes() for path in whole.rglob("trace/shard-*.safetensors")}
    assert {path.name: path.read_bytes() for path in cut.rglob("trace/shard-*.safetensors")} == shards
    assert 3 <= done < len(shards)
    whole_result, cut_result = (load_result(next(folder.rglob(RESULT_FILE))) for folder in (whole, cut))
    assert comparable(cut_result) == comparable(whole_result)


class TestFailures:
    def test_unknown_task_writes_nothing(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(TaskError):
            dbes.evaluate(tiny_checkpoint, tasks="no-such-task", output_path=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_dense_model_leaves_a_result_that_says_so(self, tiny_task: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        dense = tmp_path / "dense"
        shutil.copytree(tiny_checkpoint, dense, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"))
        config = LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
        )
        LlamaForCausalLM(config).save_pretrained(dense)
        with pytest.raises(ModelError, match="Mixture-of-Experts"):
            dbes.evaluate(dense, tasks=tiny_task, output_path=tmp_path / "results")
        result = load_result(next((tmp_path / "results").rglob(RESULT_FILE)))
        assert result.status == "error"
        assert result.error is not None and "Mixture-of-Experts" in result.error

    def test_a_failure_never_replaces_a_finished_result(
        self, evaluated: tuple[Result, Path], tiny_checkpoint: Path, tiny_task: Path
    ) -> None:
        result, folder = evaluated
        with pytest.raises(DbesError):
            dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=folder.parents[2], permutations=7)
        assert load_result(folder).created == result.created

    def test_full_disk(self, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import dbes.files

        written = 0
        true_fsync = os.fsync

        def full(handle: int) -> None:
            nonlocal written
            written += 1
            if written > 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            true_fsync(handle)

        monkeypatch.setattr(dbes.files.os, "fsync", full)
        with pytest.raises(DbesError, match="No space left"):
            dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path, **SETTINGS)
        assert not list(tmp_path.rglob("*.part"))
        assert not list(tmp_path.rglob(RESULT_FILE))
        monkeypatch.undo()
        assert dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path, **SETTINGS).status == "ok"

    def test_output_folder_that_is_a_file(self, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
        (tmp_path / "results").write_text("in the way")
        with pytest.raises(DbesError, match="results"):
            dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path / "results", **SETTINGS)

    def test_trace_of_another_recording_is_refused(
        self, evaluated: tuple[Result, Path], tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path
    ) -> None:
        _, folder = evaluated
        copy_without(folder.parents[2], tmp_path / "copy", RESULT_FILE)
        with pytest.raises(TraceError, match="holds another recording"):
            dbes.evaluate(tiny_checkpoint, tasks=tiny_task, output_path=tmp_path / "copy", seed=3, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("org/model", "org__model", id="hub id"),
        pytest.param("../../etc", "__" + "__" + "etc", id="no way out of the folder"),
        pytest.param("..", "_", id="parent"),
    ],
)
def test_result_folder_stays_inside(name: str, expected: str, tmp_path: Path) -> None:
    folder = result_folder(tmp_path, name, "sha256:" + "ab" * 32, "tiny")
    assert folder.resolve().is_relative_to(tmp_path)
    assert folder.parts[-2:] == ("ab" * 6, "tiny")
    assert folder.parts[-3].replace(".", "") == expected.replace(".", "")
