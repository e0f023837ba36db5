"""The streaming engine gives the trace of the in-memory engine, byte for byte, and finds what is wrong before it runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import character_tokenizer, discovered, representatives, tiny_model
from safetensors.torch import load_file, save_file
from test_recording import contents, written
from transformers import PreTrainedModel

import dbes
from dbes.errors import FileError, ModelError, SettingError, TraceError
from dbes.models import fitting, load_model
from dbes.models.layerwise import Layerwise
from dbes.models.memory import Available
from dbes.recording import record as recording
from dbes.recording import streaming
from dbes.recording.parking import Parking
from dbes.recording.record import Recording, record_documents
from dbes.wording import bytes_of

OTHERWISE = {"zaya"}
"""Families whose routers transformers gives another bias on loading than the checkpoint has."""


def saved(folder: Path, model: PreTrainedModel | str, **options: Any) -> Path:
    model = tiny_model(model) if isinstance(model, str) else model
    model.save_pretrained(folder, **options)
    character_tokenizer().save_pretrained(folder)
    return folder


def recorded(checkpoint: Path, output: Path | None, *, layerwise: bool, **options: Any) -> Recording:
    loaded = load_model(checkpoint, layerwise=layerwise, **({"dtype": options.pop("dtype")} if "dtype" in options else {}))
    return record_documents(loaded, written(), domains=("a", "b"), **{"window": 40, "output_path": output, **options})


def room(monkeypatch: pytest.MonkeyPatch, *, states: int, ahead: bool) -> None:
    monkeypatch.setattr(streaming.StreamingEngine, "_room", lambda *_: streaming._Room(states=states, ahead=ahead))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(tmp_path / "model", "olmoe", max_shard_size="150KB")


@pytest.mark.parametrize("family", representatives(sorted(set(discovered()) - OTHERWISE)))
def test_the_trace_is_that_of_the_memory_engine(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "model", family)
    expected = recorded(model, tmp_path / "memory", layerwise=False)
    found = recorded(model, tmp_path / "streaming", layerwise=True)
    assert contents(tmp_path / "streaming") == contents(tmp_path / "memory")
    assert (expected.engine, found.engine, found.batching) == ("memory", "streaming", expected.batching)
    room(monkeypatch, states=0, ahead=False)  # all hidden states in the file, nothing read ahead
    recorded(model, tmp_path / "parked", layerwise=True)
    assert contents(tmp_path / "parked") == contents(tmp_path / "memory")


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3, "window": 11}, {"control": 0, "stiffness": False}])
def test_with_every_setting(checkpoint: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(checkpoint, tmp_path / "memory", layerwise=False, **options)
    room(monkeypatch, states=20_000, ahead=True)  # a part of the batches in the file
    recorded(checkpoint, tmp_path / "streaming", layerwise=True, **options)
    assert contents(tmp_path / "streaming") == contents(tmp_path / "memory")


def test_in_sixteen_bits_layers_are_those_of_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    recorded(checkpoint, tmp_path / "memory", layerwise=False, dtype="bfloat16")
    recorded(checkpoint, tmp_path / "streaming", layerwise=True, dtype="bfloat16")
    assert contents(tmp_path / "streaming") == contents(tmp_path / "memory")


def test_every_byte_is_read_once_and_the_head_never(checkpoint: Path) -> None:
    done = recorded(checkpoint, None, layerwise=True)
    tensors = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    layers = {name: tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.")}
    unneeded = sum(size for name, size in layers.items() if name.startswith("model.layers.3.mlp.experts."))
    assert done.bytes_read == sum(layers.values()) - unneeded  # the last layer ends with its router
    assert done.bytes_skipped == unneeded > 0
    whole = load_model(checkpoint, layerwise=True)
    assert whole.layerwise is not None
    assert whole.layerwise.bytes_read == sum(tensors[name].nbytes for name in ("model.embed_tokens.weight", "model.norm.weight"))
    assert whole.model.get_output_embeddings().weight.is_meta


def test_one_layer_is_in_memory_at_a_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(checkpoint, layerwise=True)
    held: list[set[int]] = []
    load = Layerwise.load

    def noting(self: Layerwise, index: int) -> None:
        load(self, index)
        held.append({place for place, layer in enumerate(self.layers) if not any(each.is_meta for each in layer.parameters())})

    monkeypatch.setattr(Layerwise, "load", noting)
    record_documents(loaded, written(), domains=("a", "b"), window=40)
    assert held == [{0}, {1}, {2}, set()]  # of the last, the experts are not there
    assert all(each.is_meta for layer in loaded.layerwise.layers for each in layer.parameters())  # pyright: ignore
    assert not any("forward" in vars(layer) for layer in loaded.layerwise.layers)  # pyright: ignore


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def in_blocks(folder: Path) -> dict[str, torch.Tensor]:
    """Put the linear maps of the layers into fp8 with a scale for each 16 x 16 block; what they stand for, block by block."""
    path, stored, meant = folder / "model.safetensors", {}, {}
    for name, tensor in load_file(path).items():
        stored[name] = meant[name] = tensor
        if not name.startswith("model.layers.") or tensor.ndim != 2 or name.endswith("mlp.gate.weight"):
            continue
        scale = torch.empty(tensor.shape[0] // 16, tensor.shape[1] // 16)
        stored[name], meant[name] = torch.empty_like(tensor, dtype=torch.float8_e4m3fn), torch.empty_like(tensor)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                block = (slice(row * 16, row * 16 + 16), slice(column * 16, column * 16 + 16))
                scale[row, column] = tensor[block].abs().max() / 400
                stored[name][block] = (tensor[block] / scale[row, column]).to(torch.float8_e4m3fn)
                meant[name][block] = stored[name][block].float() * scale[row, column]
        stored[f"{name}_scale_inv"] = scale
    save_file(stored, path, metadata={"format": "pt"})
    return meant


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_fp8_is_dequantized_layer_by_layer_and_named(tmp_path: Path) -> None:
    quantized, plain = saved(tmp_path / "quantized", "qwen3_moe"), saved(tmp_path / "plain", "qwen3_moe")
    meant = in_blocks(quantized)
    edit(quantized, quantization_config=FP8)
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    found = recorded(quantized, None, layerwise=True).trace
    expected = recorded(plain, None, layerwise=False).trace
    assert found.provenance["quantization"] == "fp8, blocks of 16 x 16"
    assert "quantization" not in expected.provenance
    for one, other in zip(found, expected, strict=True):
        assert all((one.arrays()[name] == other.arrays()[name]).all() for name in ("ids", "weights", "kept"))


def test_mxfp4_is_dequantized_layer_by_layer_and_named(tmp_path: Path) -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    quantized, plain = (saved(tmp_path / name, tiny_model("gpt_oss", intermediate_size=64)) for name in ("quantized", "plain"))
    stored, meant = {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = tensor.shape
        del stored[name]
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
        meant[name] = (pairs * 2.0 ** (scales.float() - 127)[..., None]).reshape(experts, outputs, inputs).transpose(1, 2).contiguous()
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    edit(quantized, quantization_config={"quant_method": "mxfp4"})
    found = recorded(quantized, None, layerwise=True).trace
    expected = recorded(plain, None, layerwise=False).trace
    assert found.provenance["quantization"] == "mxfp4"
    for one, other in zip(found, expected, strict=True):
        assert all((one.arrays()[name] == other.arrays()[name]).all() for name in ("ids", "weights", "kept"))


def test_a_bad_shard_is_named_before_the_first_forward(checkpoint: Path) -> None:
    path = sorted(checkpoint.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    for how, said in (
        (path.unlink, "is missing"),
        (lambda: path.write_bytes(whole[:-100]), "corrupt or truncated"),
        (lambda: path.write_bytes(b"\0" * 8 + whole[8:]), "corrupt or truncated"),
    ):
        how()
        with pytest.raises(ModelError, match=rf"{path.name}.*{said}"):
            load_model(checkpoint, layerwise=True)
        path.write_bytes(whole)


def test_shapes_are_compared_before_the_first_forward(checkpoint: Path) -> None:
    path = next(path for path in checkpoint.glob("*.safetensors") if "model.layers.3.mlp.gate.weight" in load_file(path))
    save_file(load_file(path) | {"model.layers.3.mlp.gate.weight": torch.ones(8, 31)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.gate\.weight has the shape \[8, 31\] in the weights, \[8, 32\]"):
        load_model(checkpoint, layerwise=True)


def test_a_tensor_that_is_not_there(checkpoint: Path) -> None:
    path = next(path for path in checkpoint.glob("*.safetensors") if "model.layers.3.mlp.gate.weight" in load_file(path))
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != "model.layers.3.mlp.gate.weight"}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.gate\.weight"):
        load_model(checkpoint, layerwise=True)


def test_a_file_that_changes_while_it_is_streamed(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, layerwise=True)
    path = sorted(checkpoint.glob("*.safetensors"))[-1]
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match=rf"{path.name}: changed since the checkpoint was opened"):
        record_documents(loaded, written(), domains=("a", "b"), window=40)
    path.unlink()
    with pytest.raises(ModelError, match=rf"{path.name}: cannot be read any more"):
        record_documents(loaded, written(), domains=("a", "b"), window=40)
    assert not any("forward" in vars(layer) for layer in loaded.layerwise.layers)  # pyright: ignore


@pytest.mark.parametrize("layer", range(4))
def test_resumed_from_the_last_whole_shard(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 60)  # several units of work
    monkeypatch.setattr(recording, "UNIT_TOKENS", 1)  # one after the other
    recorded(checkpoint, tmp_path / "memory", layerwise=False)
    load, units = Layerwise.load, []

    def broken(self: Layerwise, index: int) -> None:
        units.extend([index] * (index == layer))
        if len(units) == 2:
            raise KeyboardInterrupt
        load(self, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Layerwise, "load", broken)
        recorded(checkpoint, tmp_path / "trace", layerwise=True)
    other = saved(tmp_path / "other", tiny_model("olmoe", rms_norm_eps=1e-4))
    with pytest.raises(TraceError, match="revision"):
        recorded(other, tmp_path / "trace", layerwise=True)
    recorded(checkpoint, tmp_path / "trace", layerwise=True)
    assert contents(tmp_path / "trace") == contents(tmp_path / "memory")


def test_a_full_disk_is_met_at_the_beginning(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(Layerwise, "load", lambda *_: pytest.fail("a layer was read"))
    room(monkeypatch, states=0, ahead=True)
    with pytest.raises(FileError, match=rf"{tmp_path.name}/out: cannot be used for hidden states.*No space left on device"):
        recorded(checkpoint, tmp_path / "out", layerwise=True)


def test_too_little_memory_is_said_before_a_layer_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layerwise, "load", lambda *_: pytest.fail("a layer was read"))
    with pytest.raises(ModelError, match=r"streaming needs .*, and may use 1.05 MB; give more --max-memory"):
        recorded(checkpoint, None, layerwise=True, max_memory=2**20)


def test_a_checkpoint_that_does_not_fit_is_streamed_where_the_engine_may_be_chosen(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {name: [document.text for document in written() if document.domain == name] for name in ("a", "b")}
    task = dbes.Task(name="mine", version=1, domains=texts)

    def evaluated(engine: str, folder: str) -> dbes.Result:
        return dbes.evaluate(checkpoint, tasks=task, output_path=tmp_path / folder, engine=engine, permutations=9, dtype="bfloat16")

    fits = evaluated("auto", "fits")
    monkeypatch.setattr(fitting, "available_memory", lambda **_: Available(1, "the test"))
    with pytest.raises(ModelError, match=r"does not fit in memory, so it was not loaded: .* 1 bytes are left by the test"):
        evaluated("memory", "refused")
    streamed = evaluated("auto", "streamed")
    assert fits.recording is not None and streamed.recording is not None
    assert (fits.recording.engine, streamed.recording.engine) == ("memory", "streaming")
    assert repr(streamed.calibrated) == repr(fits.calibrated)  # NaN is not equal to itself


def test_what_cannot_be_streamed_is_refused_with_the_reason(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="a model built in memory is in memory"):
        load_model(tiny_model("olmoe"), tokenizer=character_tokenizer(), layerwise=True)
    with pytest.raises(ModelError, match="run on one device"):
        load_model(checkpoint, layerwise=True, device_map="balanced")
    edit(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized by gptq; layers are read one by one of plain checkpoints and of fp8 and mxfp4"):
        load_model(checkpoint, layerwise=True)


def test_layers_in_another_order_are_refused(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, layerwise=True)

    class Backwards(torch.nn.ModuleList):
        def __getitem__(self, place: Any) -> Any:
            return [*self][::-1] if isinstance(place, slice) else super().__getitem__(place)

    loaded.model.model.layers.__class__ = Backwards
    with pytest.raises(ModelError, match="its forward calls decoder layer 3 where 0 was to come"):
        record_documents(loaded, written(), domains=("a", "b"), window=40)


def test_memory_that_waits_in_a_file_comes_back(tmp_path: Path) -> None:
    with torch.inference_mode(), Parking(tmp_path, 64) as parking:
        whole = torch.randn(40, 50).to(torch.bfloat16)
        part, before = whole[3:].view(-1), whole.clone()
        parked = parking.park(part)
        assert whole.untyped_storage().nbytes() == 0
        parked.back()
        assert torch.equal(whole, before)
        other = torch.arange(10)
        parked = parking.park(whole, parked.place)
        second = parking.park(other)
        parked.back()
        second.back()
        assert torch.equal(whole, before) and torch.equal(other, torch.arange(10))
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from dbes.models.layerwise import Layerwise
from dbes.recording import record
from test_streaming import recorded
record.SHARD_TOKENS, record.UNIT_TOKENS = 60, 1
load, left = Layerwise.load, [int(sys.argv[1])]
def dying(self, index):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    load(self, index)
Layerwise.load = dying
recorded(Path(sys.argv[2]), Path(sys.argv[3]), layerwise=True)
"""


@pytest.mark.slow
def test_killed_at_every_layer_and_at_any_moment(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 60)
    recorded(checkpoint, tmp_path / "memory", layerwise=False)
    code = KILLED.format(tests=str(Path(__file__).parent))

    def run(loads: int, seconds: float | None = None) -> int:
        words = [sys.executable, "-c", code, str(loads), str(checkpoint), str(tmp_path / "trace")]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    assert [run(loads) for loads in (0, 1, 2, 3, 4, 1, 2, 3)] == [-signal.SIGKILL] * 8
    random = np.random.default_rng(0)
    codes = [-signal.SIGKILL]
    while codes[-1] != 0 and len(codes) < 6:
        codes.append(run(-1, float(random.uniform(2, 20))))
    assert codes[-1] == 0 or run(-1) == 0
    assert {*codes} <= {0, -signal.SIGKILL}
    assert contents(tmp_path / "trace") == contents(tmp_path / "memory")


@pytest.mark.parametrize(
    ("given", "bytes_"), [("4GiB", 4 * 2**30), ("1.5 GB", 1_500_000_000), ("700", 700), (5, 5), ("512mib", 2**29)]
)
def test_sizes_of_memory(given: Any, bytes_: int) -> None:
    assert bytes_of(str(given), option="max_memory") == bytes_


@pytest.mark.parametrize("given", ["much", "0", "-4GiB", "4 GiBs", 0, True])
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(SettingError, match=r"max_memory .*: expected a size such as 64GiB"):
        bytes_of(str(given), option="max_memory")


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_are_read_once_for_all_work_units(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 30)
    recorded(checkpoint, tmp_path / "memory", layerwise=False)
    shards = sum(1 for _ in (tmp_path / "memory").glob("shard-*"))
    loads: list[int] = []
    load = Layerwise.load
    monkeypatch.setattr(Layerwise, "load", lambda self, index: (loads.append(index), load(self, index)))
    share = recording._most
    monkeypatch.setattr(recording, "_most", lambda engine, units, lengths, _: share(engine, units, lengths, processes))
    recorded(checkpoint, tmp_path / "streaming", layerwise=True)
    assert shards > 3 and loads == [0, 1, 2, 3] * processes  # by one of so many processes, which ends alone
    assert contents(tmp_path / "streaming") == contents(tmp_path / "memory")
    loads.clear()
    monkeypatch.setattr(recording, "UNIT_TOKENS", 1)
    recorded(checkpoint, tmp_path / "apart", layerwise=True)
    assert len(loads) > 4 * processes
    assert contents(tmp_path / "apart") == contents(tmp_path / "memory")
