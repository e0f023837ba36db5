"""Whether a model is what its checkpoint says: every tensor of the files was used, or is known not to matter and named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from dbes.errors import ModelError
from dbes.models.folder import WHOLE, StoredTensor, listed
from dbes.models.sites import SENSES

LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
NEXT_TOKENS = re.compile(r"(?:^|\.)(?:mtp|nextn)[^.]*\.")
"""Modules that predict tokens after the next one, for training or speculative decoding."""

NEXT_TOKENS_LAYER = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head)\b")
"""What such a module has when it is stored as a decoder layer after the last one (DeepSeek-V3, GLM-4.5)."""

BUFFERS = re.compile(r"(?:^|\.)(?:(?:original_)?inv_freq|cos_cached|sin_cached|position_ids|masked_bias|causal_mask)$")
HEADS = re.compile(r"^(?:lm_head|v_head|value_head|score|classifier|reward_head)\.")
SCALES = re.compile(r"scale|zero_point|qzeros|g_idx|absmax|amax")

ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Makes transformers read one tensor after the other. Its threads read ahead of what puts experts together: 1.0 GB of weights in float32
took 2.0 GB at most with them, 1.2 GB without."""


@dataclass
class LoadingReport:
    """What transformers took and left, before it drops the names that a class lists as not worth a warning."""

    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    uninitialised: set[str] = field(default_factory=set)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    conversions: dict[str, str] = field(default_factory=dict)


@contextmanager
def watched_loading() -> Iterator[LoadingReport]:
    """Follow a load inside the block; transformers' own table of differences, which goes to the log, is kept quiet."""
    report = LoadingReport()
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def keep(self: PreTrainedModel, loading_info: Any) -> None:
        missing, unexpected = set(loading_info.missing_keys), set(loading_info.unexpected_keys)
        adjust(self, loading_info)
        report.missing, report.uninitialised = set(loading_info.missing_keys), missing - set(loading_info.missing_keys)
        report.unexpected, report.hidden = unexpected, unexpected - set(loading_info.unexpected_keys)
        report.mismatched = {name: (tuple(stored), tuple(built)) for name, stored, built in loading_info.mismatched_keys}
        report.conversions = dict(loading_info.conversion_errors)

    verbosity = transformers.utils.logging.get_verbosity()
    threads = os.environ.get(ONE_BY_ONE)
    os.environ[ONE_BY_ONE] = "1"
    PreTrainedModel._adjust_missing_and_unexpected_keys = keep
    transformers.utils.logging.set_verbosity_error()
    try:
        yield report
    finally:
        if threads is None:
            del os.environ[ONE_BY_ONE]
        else:
            os.environ[ONE_BY_ONE] = threads
        PreTrainedModel._adjust_missing_and_unexpected_keys = adjust
        transformers.utils.logging.set_verbosity(verbosity)


def refuse_unfit(where: str, report: LoadingReport) -> None:
    """What stops a load: shapes that differ, tensors that could not be converted.

    Raises:
        ModelError: names the first tensors.
    """
    for name, (stored, built) in sorted(report.mismatched.items()):
        more = f" and {len(report.mismatched) - 1} more" if len(report.mismatched) > 1 else ""
        raise ModelError(
            f"{where}: {name} has the shape {list(stored)} in the weights, {list(built)} by config.json{more}; "
            "they do not belong together: sizes, heads or numbers of experts were edited, or files were mixed up"
        )
    for name, problem in sorted(report.conversions.items()):
        said = " ".join(str(problem).split())[-200:]
        raise ModelError(f"{where}: {name} cannot be put together from the weights ({said}); tensors are missing or of different shapes")


def account(
    where: str,
    model: PreTrainedModel,
    report: LoadingReport,
    tensors: Mapping[str, StoredTensor],
    *,
    skeleton: PreTrainedModel | None,
    quantized: bool,
) -> tuple[str, ...]:
    """Notes on tensors that were not used and do not matter to routing.

    Args:
        tensors: those of the files.
        skeleton: the model that config.json describes, without weights.
        quantized: whether config.json says that the weights are, in a way that transformers reads.

    Raises:
        ModelError: tensors are missing, left over, of another shape than config.json says, or not the numbers they stand for.
    """
    if missing := sorted(report.missing):
        raise ModelError(
            f"{where}: {len(missing)} tensors are not in the weights (first: {missing[0]}), they would be random; "
            "the checkpoint is incomplete or belongs to another config.json"
        )
    _refuse_other_shapes(where, model, skeleton)
    notes: dict[str, list[str]] = {}
    lost: list[str] = []
    depth = _depth(model)
    following = {_layer(name) for name in report.unexpected if NEXT_TOKENS_LAYER.search(name)}
    for name in sorted(report.unexpected):
        kind = _harmless(name, depth, following, hidden=name in report.hidden)
        if kind is None:
            lost.append(name)
        else:
            notes.setdefault(kind, []).append(name)
    if lost:
        raise ModelError(f"{where}: {_reason(lost, depth)}")
    _refuse_raw_numbers(where, model, tensors, quantized=quantized)
    told = [f"{len(names)} tensors of the checkpoint were not loaded, {kind}: {names[0]}, ..." for kind, names in sorted(notes.items())]
    if report.uninitialised:
        first = sorted(report.uninitialised)[0]
        told.append(f"{len(report.uninitialised)} tensors are not in the checkpoint and have their class's value: {first}, ...")
    return tuple(told)


def _harmless(name: str, depth: int | None, following: set[int | None], *, hidden: bool) -> str | None:
    """Why a tensor that was left over does not change routing, or None."""
    layer = _layer(name)
    if NEXT_TOKENS.search(name) or (layer is not None and depth is not None and layer >= depth and layer in following):
        return "layers that predict further tokens"
    if SENSES.search(name):
        return "parts for images, sound or speech"
    if BUFFERS.search(name):
        return "buffers that the model computes itself"
    if HEADS.search(name):
        return "output heads"
    beyond = layer is not None and depth is not None and layer >= depth
    if hidden and not beyond and not SCALES.search(name):
        return "which its class in transformers does not use"
    return None


def _reason(lost: list[str], depth: int | None) -> str:
    beyond = [name for name in lost if depth is not None and (_layer(name) or 0) >= depth]
    if scales := [name for name in lost if SCALES.search(name.rpartition(".")[2])]:
        return (
            f"{listed(scales)} left over: scales of quantized weights that transformers {transformers.__version__} does not read, so "
            "what it loaded is not the model; give the checkpoint in bfloat16, or quantized in a way that it reads"
        )
    if beyond:
        return (
            f"{listed(beyond)} left over: the weights hold {max(_layer(name) or 0 for name in beyond) + 1} layers, config.json names "
            f"{depth}; they do not belong together"
        )
    return (
        f"{listed(lost)} left over: the model that config.json describes has no place for them, so it is not the model of these "
        "weights; give the config.json that belongs to them"
    )


def _refuse_other_shapes(where: str, model: PreTrainedModel, skeleton: PreTrainedModel | None) -> None:
    """Shapes that transformers does not compare: those of a checkpoint that it dequantizes."""
    if skeleton is None:
        return
    built = skeleton.state_dict()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(built.get(name), torch.Tensor):
            continue
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.shape != built[name].shape:
            stored = {name: (tuple(tensor.shape), tuple(built[name].shape))}
            refuse_unfit(where, LoadingReport(mismatched=stored))


def _refuse_raw_numbers(where: str, model: PreTrainedModel, tensors: Mapping[str, StoredTensor], *, quantized: bool) -> None:
    """Packed or whole numbers that were loaded as if they were the weights."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    if narrow := [name for name, tensor in own.items() if tensor.is_floating_point() and tensor.itemsize == 1]:
        raise ModelError(f"{where}: {listed(narrow)} still {own[narrow[0]].dtype} after loading: its scale was not read")
    whole = {name.rpartition(".")[2] for name, tensor in own.items() if not tensor.is_floating_point()}
    raw = [name for name, tensor in tensors.items() if WHOLE.fullmatch(tensor.dtype) and name.rpartition(".")[2] not in whole]
    raw = [name for name in raw if name in own or name.endswith("weight")]
    if raw and not quantized:
        raise ModelError(
            f"{where}: {listed(raw)} stored as {tensors[raw[0]].dtype}, packed or quantized, and config.json does not say how; "
            "its quantization_config was taken out, or transformers does not read this one"
        )


def _depth(model: PreTrainedModel) -> int | None:
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("num_hidden_layers", "n_layers", "num_layers", "n_layer"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def _layer(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found[1]) if found else None
