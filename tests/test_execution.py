"""Every forward of dbes: on whatever device, compiled or not, and with whatever the whole model does before its base runs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import nn

from dbes.models.doctor import examine
from dbes.models.execution import forward, input_device, logits_of
from dbes.models.hooks import Decision, watching
from dbes.models.sites import find_sites

PROCESS = Path(__file__).with_name("elsewhere_process.py")
ON_A_DEVICE = (
    "recording",
    "recording of experts that are modules",
    "doctor",
    "doctor of experts that are modules",
    "finetuning: held-out texts",
    "finetuning: reach and losses",
    "paths: gradients",
    "paths: masking",
    "intervention: held-out documents",
    "intervention: cells",
    "intervention: protected cells",
    "intervention: low rank",
    "intervention: routers",
    "intervention: full",
    "testbed: held-out documents",
    "testbed: routes as in training",
    "testbed: loss",
)
IDS = torch.randint(5, 120, (2, 17), generator=torch.Generator().manual_seed(0))


@functools.cache
def on_a_device() -> dict[str, str]:
    """What every check says, by name."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROCESS.parent.parent), str(PROCESS.parent)])}
    done = subprocess.run([sys.executable, PROCESS], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("check", ON_A_DEVICE)
def test_what_feeds_a_model_feeds_it_on_its_device(check: str) -> None:
    """Against the same on the CPU, on a device whose tensors refuse to be mixed with the CPU's (`elsewhere`)."""
    assert set(on_a_device()) == set(ON_A_DEVICE)
    assert on_a_device()[check] == "ok"


def routed(model: nn.Module, **options: Any) -> list[Decision]:
    found: dict[int, Decision] = {}
    with torch.inference_mode(), watching(find_sites(model), lambda index, decision: found.__setitem__(index, decision), **options):
        forward(model, input_ids=IDS)
    return [found[index] for index in sorted(found)]


def assert_same_routing(one: list[Decision], other: list[Decision]) -> None:
    assert len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.ids, second.ids) and torch.equal(first.weights, second.weights)


def compiled_layers(model: Any) -> Any:
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = torch.compile(layer, backend="eager")
    return model


def compiled_blocks(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    model.model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled",
    [lambda model: torch.compile(model, backend="eager"), compiled_in_place, compiled_layers, compiled_blocks],
    ids=["model", "base in place", "layers", "blocks"],
)
def test_a_compiled_model_is_read_like_a_plain_one(compiled: Any) -> None:
    plain = routed(tiny_model("olmoe"))
    assert_same_routing(routed(compiled(tiny_model("olmoe")), stop=True), plain)


@pytest.mark.slow
def test_a_model_that_has_run_compiled_is_read_like_a_plain_one() -> None:
    model = compiled_in_place(tiny_model("olmoe"))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert_same_routing(routed(model), routed(tiny_model("olmoe")))


def packed(model: Any) -> Any:
    """As compressed-tensors leaves a model: weights packed away, and a hook on the whole model that puts them back, once."""
    kept = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            kept[name] = module.weight.detach()
            del module.weight
            module.weight_packed = nn.Parameter(torch.zeros(1), requires_grad=False)

    def decompress(whole: Any, _: tuple) -> None:
        for name, weight in kept.items():
            module = whole.get_submodule(name)
            del module.weight_packed
            module.weight = nn.Parameter(weight)
        handle.remove()

    handle = model.register_forward_pre_hook(decompress)
    return model


@pytest.mark.parametrize("stop", [False, True])
def test_weights_that_the_whole_model_unpacks_are_unpacked(stop: bool) -> None:
    model = packed(tiny_model("olmoe"))
    assert_same_routing(routed(model, stop=stop), routed(tiny_model("olmoe")))
    assert not model._forward_pre_hooks
    assert examine(packed(tiny_model("olmoe"))).ok


def test_what_the_whole_model_prepares_for_its_base_is_prepared() -> None:
    """Code beside a checkpoint may do in its outer forward what the routing depends on."""
    model = tiny_model("olmoe")
    plain = routed(model)

    def shifted(input_ids: Any, **options: Any) -> Any:
        return model.model(input_ids=(input_ids + 1) % 120, **options)

    model.forward = shifted
    other = tiny_model("olmoe")
    with torch.inference_mode():
        found: dict[int, Decision] = {}
        with watching(find_sites(other), lambda index, decision: found.__setitem__(index, decision)):
            other(input_ids=(IDS + 1) % 120)
    assert_same_routing(routed(model), list(found.values()))
    assert not torch.equal(routed(model)[0].ids, plain[0].ids)


def test_the_head_is_left_out_where_nothing_needs_it() -> None:
    model = tiny_model("olmoe")
    ran: list[str] = []
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    routed(model)
    assert not ran
    assert logits_of(model, input_ids=IDS).shape == (2, 17, 128) and ran == ["head"]
    assert input_device(model) == torch.device("cpu")
