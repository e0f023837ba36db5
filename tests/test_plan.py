"""`dbes plan`: engine, time, options; and a finetuning run that cannot fit is refused before its model is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import character_tokenizer, tiny_model
from typer.testing import CliRunner

from dbes.cli import app
from dbes.errors import FinetuneError, ModelError, SettingError
from dbes.evaluation import plan as planning
from dbes.evaluation.plan import UNIT_TOKENS, EngineNeed, choose_engine, measure_disk, measure_flops, plan, read_needs, seconds_of
from dbes.finetuning import needs as finetuning
from dbes.finetuning import run as finetuning_run
from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.needs import needs_of_cells, needs_of_share
from dbes.finetuning.run import finetune
from dbes.finetuning.settings import make_settings
from dbes.finetuning.training import make_optimizer
from dbes.models.memory import Available
from dbes.models.needs import Needs
from dbes.paths.types import Cell, ExpertPath, Provenance
from dbes.wording import byte_count, bytes_of, duration

NEED = EngineNeed(memory=100, streaming=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("olmoe").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def needs(folder: Path) -> Needs:
    return read_needs(str(folder))[1]


@pytest.mark.parametrize(
    ("left", "asked", "engine"),
    [
        (100, "auto", "memory"), (99, "auto", "streaming"), (10, "auto", "streaming"), (9, "auto", None), (100, "memory", "memory"),
        (99, "memory", None), (100, "streaming", "streaming"), (10, "streaming", "streaming"), (9, "streaming", None),
    ],
)  # fmt: skip
def test_the_engine(left: int, asked: str, engine: str | None) -> None:
    available = Available(left, "the limit of the control group /job")
    if engine is None:
        with pytest.raises(ModelError, match=r"bytes are left by the limit of the control group /job") as refused:
            choose_engine(NEED, available, asked)
        assert ("--engine streaming" in str(refused.value)) is (asked == "memory" and left >= 10)
    else:
        choice = choose_engine(NEED, available, asked)
        assert choice.engine == engine
        assert choice.reason


def test_a_small_model_that_only_fits_in_memory_stays_there() -> None:
    assert choose_engine(EngineNeed(memory=5, streaming=8), Available(6, "x")).engine == "memory"


def test_an_unknown_engine() -> None:
    with pytest.raises(SettingError, match="streaming"):
        choose_engine(NEED, Available(1, "x"), "steaming")


def test_time_is_linear_in_tokens_and_reading_in_units(needs: Needs) -> None:
    def seconds(tokens: int, *, disk: float = 1e6, flops: float = 1e9) -> dict:
        return seconds_of(needs, dtype="float32", tokens=tokens, disk=disk, flops=flops)

    one, two, four = (seconds(tokens)["memory"] for tokens in (100_000, 200_000, 400_000))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-12)
    assert needs.files is not None
    assert 2 * one - two == pytest.approx(needs.files / 1e6, rel=1e-9)
    # where the disk is the slower one, a unit costs one reading; where it computes longer, reading is hidden
    reading = [seconds(tokens, flops=1e18)["streaming"] for tokens in (1, UNIT_TOKENS, UNIT_TOKENS + 1, 3 * UNIT_TOKENS)]
    assert reading == pytest.approx([each * needs.files / 1e6 for each in (1, 1, 2, 3)], rel=1e-12)
    assert seconds(UNIT_TOKENS, disk=1e18)["streaming"] == pytest.approx(2 * seconds(UNIT_TOKENS // 2, disk=1e18)["streaming"], rel=1e-12)


def test_operations_by_hand(needs: Needs) -> None:
    """Attention (four matrices), two of eight experts, the router, the norms; four layers of width 32."""
    layer = 4 * 32 * 32 - 2 * 32 * 16 + 2 * 3 * 32 * 48 + 8 * 32 + 2 * 32 + 32 + 16
    seconds = seconds_of(replace(needs, files=1), dtype="float32", tokens=10, disk=1e18, flops=1)["memory"]
    assert seconds == pytest.approx(10 * 2 * 4 * layer / planning.EFFICIENCY)


def test_dtype_and_engine_as_memory_gets_less(needs: Needs) -> None:
    tokens = planning.SMALLEST_BATCH
    seen = []
    for dtype in ("float32", "bfloat16"):
        for engine in (needs.memory, needs.streaming):
            found = plan(needs, model="m", available=Available(engine(dtype, tokens=tokens), "x"), disk=1, flops=1)
            seen.append((found.dtype, found.choice and found.choice.engine))
    assert seen[0] == ("float32", "memory")
    assert seen[2] == ("bfloat16", "memory")
    assert seen[3] == ("bfloat16", "streaming")
    nothing = plan(needs, model="m", available=Available(1, "x"), disk=1, flops=1)
    assert nothing.choice is None and "even layer by layer" in nothing.reason


def test_speeds_are_measured(folder: Path, needs: Needs) -> None:
    assert measure_disk(str(folder)) > 0
    assert measure_flops(needs, "float32") > 0


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "80"})
    return done.exit_code, done.output


def test_the_command(folder: Path, needs: Needs) -> None:
    code, told = run("--model", str(folder), "--memory", "64GiB", "--disk-speed", "3GB", "--flops", "4e14", "--paths", "0.25")
    assert code == 0, told
    assert f"{needs.parameters:,}, {needs.active:,} active" in told
    assert "68.7 GB, by the memory that was given" in told
    assert "disk 3 GB/s, multiplications 400 TFLOP/s" in told
    assert "Engine: memory, float32" in told
    assert "Training 8 experts" in told


def test_the_command_as_json_for_a_task(folder: Path) -> None:
    machine = ("--memory", "1kB", "--disk-speed", "1", "--flops", "1")
    code, told = run("--model", str(folder), *machine, "--tasks", "embedded", "--format", "json")
    assert code == 0, told
    content = json.loads(told)
    assert content["choice"] is None and content["tokens"] > 100_000
    assert content["needs"]["weights"]["float32"] > content["needs"]["weights"]["bfloat16"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--memory", "lots"], r"--memory 'lots': expected a size such as 64GiB"),
        (["--disk-speed", "0"], "--disk-speed '0': expected a size"),
        (["--tokens", "5", "--tasks", "embedded"], "give one of them"),
        (["--paths", "1.5"], "a share of 1.5: expected a number above 0"),
        (["--paths", "missing.json"], "missing.json: there is no such file"),
    ],
)
def test_what_cannot_be_planned(folder: Path, words: list[str], match: str) -> None:
    code, told = run("--model", str(folder), "--flops", "1", *words)
    assert code != 0 and match in " ".join(told.split())


def test_a_hub_id_without_the_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, told = run("--model", "nobody/nothing-here")
    assert code == 1
    assert told.count("\n") == 1 and "cannot be reached" in told


def cells() -> list[Cell]:
    return [Cell(0, 1), Cell(0, 5), Cell(2, 0)]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "rank"), [("float32", None), ("bfloat16", None), ("bfloat16", 3)])
def test_what_a_path_needs_is_what_training_holds(family: str, dtype: str, rank: int | None, tmp_path: Path) -> None:
    model = tiny_model(family).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    skeleton, _ = read_needs(str(tmp_path))
    found = needs_of_cells(skeleton, cells(), rank=rank, dtype=dtype)
    with TrainableCells(model, cells(), rank=rank) as trained:
        optimizer = make_optimizer(trained.parameters(), make_settings())
        assert found.parameters == sum(leaf.numel() for leaf in trained.parameters())
        assert (found.leaves, found.moments) == (trained.chosen_bytes, trained.optimizer_bytes(optimizer))
        if rank is None:
            trained.protect({"other": [torch.arange(3, 60)[None]] * 8}, floor=0.1)
            # experts that no protected token reached have no matrix
            assert 0 < trained.protection_bytes <= found.protection


def test_a_share_is_that_part_of_all_experts(folder: Path, needs: Needs) -> None:
    skeleton, _ = read_needs(str(folder))
    found, whole = needs_of_share(skeleton, 0.25, dtype="float32"), needs_of_share(skeleton, 1, dtype="float32")
    assert (whole.parameters, 4 * found.parameters) == (needs.routed, needs.routed)
    assert found.training == 16 * found.parameters
    assert needs_of_cells(skeleton, [(layer, 0) for layer in range(4)], dtype="float32").training == whole.training // 8


def test_finetuning_that_cannot_fit_is_refused_before_loading(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(finetuning_run, "load_model", begun)
    path = ExpertPath(
        domain="d", rule="r", cells=tuple(cells()), layers=(0, 1, 2, 3), experts=(8,) * 4, share=0.1,
        provenance=Provenance(model="m", dbes="0"),
    )  # fmt: skip
    skeleton, needs = read_needs(str(folder))
    least = needs.weights["bfloat16"] + needs_of_cells(skeleton, cells(), dtype="bfloat16").total(validation=True, protect=False)
    monkeypatch.setattr(finetuning, "memory_at", lambda *_, **__: Available(least - 1, "the limit of the control group /job"))
    with pytest.raises(FinetuneError, match=r"training 3 experts does not fit in memory, so nothing was loaded: .* control group /job"):
        finetune(folder, path, "task:law", tmp_path / "out")
    monkeypatch.setattr(finetuning, "memory_at", lambda *_, **__: Available(least, "x"))
    with pytest.raises(AssertionError, match="was loaded"):
        finetune(folder, path, "task:law", tmp_path / "out2")


@pytest.mark.parametrize(("text", "number"), [("64GiB", 64 * 2**30), ("3 GB", 3 * 10**9), ("1.5k", 1500), ("12", 12), ("2tib", 2 * 2**40)])
def test_sizes_are_read(text: str, number: int) -> None:
    assert bytes_of(text, option="--memory") == number


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (999_960, "1 MB"), (23_100_000_000, "23.1 GB"), (2e15, "2,000 TB")],
)
def test_sizes_are_written(number: float, text: str) -> None:
    assert byte_count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.5, "0.5 s"), (40, "40 s"), (720, "12 min"), (18_360, "5.1 h"), (276_480, "3.2 days")])
def test_durations_are_written(seconds: float, text: str) -> None:
    assert duration(seconds) == text
