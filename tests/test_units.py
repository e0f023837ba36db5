"""Work units: every document once, whole shards, and the same bytes whatever is recorded at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_same_routes
from test_engines import ANSWERS, layer_by_layer, scripted, step_by_step, told
from test_recording import Document, contents, record, written

from dbes.errors import FileError, RecordingError
from dbes.recording import forward, ledger, units
from dbes.recording import record as recording
from dbes.recording.background import WAITING, Background
from dbes.recording.batches import Batching, Window, batches, first_batch, longest_first
from dbes.recording.units import work_units
from dbes.trace import blocks
from dbes.trace.spool import Spool


def cut_in_a_loop(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Shards, written down from the rule alone: a document goes on a shard where there is room for it, else on the next."""
    shards: list[list[int]] = [[]]
    for index, length in enumerate(lengths):
        if sum(lengths[each] for each in shards[-1]) > 0 and sum(lengths[each] for each in shards[-1]) + length > limit:
            shards.append([])
        shards[-1].append(index)
    return [(shard[0], shard[-1] + 1) for shard in shards]


@given(st.lists(st.integers(1, 90_000), min_size=1, max_size=300), st.sampled_from([100, 885, 10_000]))
@settings(max_examples=60, deadline=None)
def test_units_are_runs_of_whole_shards_of_about_an_eighth(lengths: list[int], bytes_per_token: int) -> None:
    found = work_units(lengths, bytes_per_token)
    limit = {100: 65_536, 885: 16_384, 10_000: 16_384}[bytes_per_token]
    assert [shard for unit in found for shard in unit.shards] == cut_in_a_loop(lengths, limit)
    assert [unit.number for unit in found] == list(range(len(found)))
    assert [unit.first_shard for unit in found] == [sum(len(each.shards) for each in found[:place]) for place in range(len(found))]
    sizes = [sum(lengths[slice(*unit.documents)]) for unit in found]
    shards = [sum(lengths[low:high]) for low, high in cut_in_a_loop(lengths, limit)]
    target, largest = min(1_000_000, sum(lengths) / 8), max(shards)
    assert max(sizes) <= target + largest + 1
    # so many processes can share the work: no two neighbours would be one unit
    assert all(one + other > target - largest for one, other in pairwise(sizes))


def test_units_of_a_long_recording_hold_a_million_tokens() -> None:
    found = work_units([1000] * 50_000, 885)
    assert 48 <= len(found) <= 52 and all(abs(1000 * (high - low) - 1_000_000) < 20_000 for low, high in (u.documents for u in found[:-1]))
    assert len(work_units([300] * 2000, 885)) >= 8 and len(work_units([10], 885)) == 1


def windows_of(lengths: Sequence[int]) -> list[Window]:
    return [Window(index, str(index), 0, np.zeros(length, np.int32)) for index, length in enumerate(lengths)]


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=80),
    st.integers(1, 3000),
    st.booleans(),
    st.sampled_from(["padded", "equal lengths", "one at a time"]),
    st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_batches_hold_every_window_once(lengths: list[int], budget: int, by_count: bool, batching: Batching, extra: int) -> None:
    found = list(batches(windows_of(lengths), budget, by_count=by_count, batching=batching, extra=extra))
    assert [window.document for batch in found for window in batch] == sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for batch in found:
        size = len(batch) * (max(map(len, batch)) + extra)
        assert len(batch) == 1 or (len(batch) <= budget if by_count else size <= budget)
        assert batching != "one at a time" or len(batch) == 1
        assert batching != "equal lengths" or len(set(map(len, batch))) == 1


def test_a_unit_of_many_tokens_needs_few_forwards() -> None:
    """Longest first over a million tokens, batches are nearly full; inside shards of 16 k tokens they are not."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(180), 0.9, 4000), 8, 2048).astype(int).tolist()
    total = sum(lengths)

    def forwards(parts: Sequence[tuple[int, int]]) -> float:
        cut = [windows_of(lengths[low:high]) for low, high in parts]
        made = [batch for part in cut for batch in batches(part, 16_384, by_count=False, batching="padded", extra=0)]
        return len(made) / total * 1e6

    apart = forwards([shard for unit in work_units(lengths, 885) for shard in unit.shards])
    whole = forwards([(0, len(lengths))])
    assert whole < 100 < 400 < apart and first_batch(longest_first(windows_of(lengths)), 16_384, by_count=False, batching="padded", extra=0)


def one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNITS", 1)


@pytest.mark.parametrize("order", [step_by_step, layer_by_layer])
@pytest.mark.parametrize("spooled", [False, True])
def test_what_is_recorded_at_a_time_changes_no_byte(order: Any, spooled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 20)
    told(scripted(order), tmp_path / "shards")
    one_unit(monkeypatch)
    if spooled:
        monkeypatch.setattr(blocks, "SPOOL_BYTES", 0)
    engine = scripted(order, answers=ANSWERS)
    told(engine, tmp_path / "unit")
    assert contents(tmp_path / "unit") == contents(tmp_path / "shards") and len(engine.asked) == 1
    assert len(list((tmp_path / "unit").glob("shard-*"))) == 4


@pytest.mark.parametrize("family", ["olmoe", "longcat_flash", "doge"])
def test_one_text_at_a_time_gives_the_same_bytes_in_units_and_in_shards(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 60)
    record(family, written(9), output_path=tmp_path / "shards", batch_size=1)
    together = record(family, written(9)).trace
    one_unit(monkeypatch)
    monkeypatch.setattr(blocks, "SPOOL_BYTES", 0)
    record(family, written(9), output_path=tmp_path / "unit", batch_size=1)
    assert contents(tmp_path / "unit") == contents(tmp_path / "shards")
    assert_same_routes(record(family, written(9), output_path=tmp_path / "batches").trace, together)


def test_a_unit_is_batched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    real = forward.begin_batch

    def seen(engine: Any, windows: Sequence[Window]) -> Any:
        sizes.append([len(window) for window in windows])
        return real(engine, windows)

    monkeypatch.setattr(forward, "begin_batch", seen)
    monkeypatch.setattr(recording, "SHARD_TOKENS", 40)
    documents = [Document(f"text-{index}", "ab"[index % 2], "word" * (1 + 4 * (index % 2))) for index in range(12)]
    record("olmoe", documents, control=0, stiffness=False)
    apart = len(sizes)
    sizes.clear()
    one_unit(monkeypatch)
    record("olmoe", documents, control=0, stiffness=False)
    assert sizes == [[20] * 6, [4] * 6] and apart > 4


@pytest.mark.parametrize("stop_at", [0, 3, 7])
def test_an_interrupted_unit_is_recorded_again(stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 20)
    told(scripted(), tmp_path / "whole")
    one_unit(monkeypatch)
    monkeypatch.setattr(blocks, "SPOOL_BYTES", 0)
    write, left = ledger.write_shard, iter(range(stop_at, -1, -1))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(left) == 0:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            told(scripted(), tmp_path / "cut")
    assert not list((tmp_path / "cut").glob(".*")), "a spool was left"
    engine = scripted()
    told(engine, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and engine.asked == [0]


@pytest.mark.parametrize("harm", ["a shard is missing", "a shard is altered", "the record is altered", "the record is half", "another cut"])
def test_a_unit_that_is_not_as_it_was_written_is_recorded_again(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 20)
    told(scripted(), tmp_path / "whole")
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(ledger.TraceWriter, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            told(scripted(), cut)
    kept, shard, asked = cut / "units" / "unit-00001.json", cut / "control" / "shard-00001.safetensors", 1
    if harm == "a shard is missing":
        shard.unlink()
    elif harm == "a shard is altered":
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    elif harm == "the record is altered":
        kept.write_text(kept.read_text().replace('"unit": 1', '"unit": 2'))
    elif harm == "the record is half":
        kept.write_text(kept.read_text()[:100])
    else:
        one_unit(monkeypatch)
    engine = scripted()
    told(engine, cut)
    assert contents(cut) == contents(tmp_path / "whole") and len(engine.asked) == asked


class TestSpool:
    def test_arrays_hold_marks_and_what_is_written(self, tmp_path: Path) -> None:
        kinds = [((3, 50), 255, np.uint8), ((2, 7, 3), np.nan, np.float16), ((5,), 0, np.float32), ((0, 4), 1, np.int16)]
        spool = Spool(tmp_path, sum(Spool.needed(shape, kind) for shape, _, kind in kinds))
        arrays = [spool.full(shape, mark, kind) for shape, mark, kind in kinds]
        for array, (shape, mark, kind) in zip(arrays, kinds, strict=True):
            np.testing.assert_array_equal(array, np.full(shape, mark, kind))
        arrays[0][1, 3:9] = 7
        spool.release()
        assert (arrays[0] == 7).sum() == 6 and (arrays[0] == 255).sum() == 144 and np.isnan(arrays[1]).all()
        del spool
        assert (arrays[0][1, 3:9] == 7).all() and not list(tmp_path.iterdir())

    def test_a_full_disk_is_found_before_the_work(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"cannot be given the [\d,]+ bytes that a work unit needs on this disk"):
            Spool(tmp_path, 1 << 62)
        assert not list(tmp_path.iterdir())


class TestBackground:
    def test_in_order_in_one_other_thread_and_never_far_behind(self) -> None:
        done: list[tuple[int, str]] = []
        free = threading.Event()
        with Background() as host:
            host.do(free.wait)
            for number in range(WAITING - 1):
                host.do(lambda number=number: done.append((number, threading.current_thread().name)))
            waits = threading.Thread(target=host.do, args=(done.append, (99, "")))
            waits.start()
            waits.join(0.05)
            assert waits.is_alive() and not done  # no room yet
            free.set()
            waits.join()
        assert [number for number, _ in done] == [*range(WAITING - 1), 99]
        assert {name for _, name in done[:-1]} and threading.current_thread().name not in {name for _, name in done}

    def test_an_error_reaches_the_one_who_gave_and_stops_what_follows(self) -> None:
        done: list[int] = []

        def fails() -> None:
            try:
                raise ValueError("inner")
            except ValueError as problem:
                raise RecordingError("outer") from problem

        with pytest.raises(RecordingError, match="outer") as caught, Background() as host:
            host.do(fails)
            for number in range(5):
                host.do(done.append, number)
        assert isinstance(caught.value.__cause__, ValueError) and not done

    def test_an_error_of_the_owner_is_the_one_that_is_raised(self) -> None:
        def fails() -> None:
            raise RecordingError("later")

        with pytest.raises(KeyboardInterrupt), Background() as host:
            host.do(fails)
            raise KeyboardInterrupt
