"""Masked routers against models from which the experts were really taken, REAP's score against a loop, and what pruning costs texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from mock_remote_moe import READ, MockMoeConfig, MockMoeForCausalLM
from torch import Tensor
from typer.testing import CliRunner

from dbes.cli import app
from dbes.comparison.pruning import Pruning, prune
from dbes.errors import ModelError, PathError
from dbes.finetuning.evaluation import measure_texts
from dbes.models.hooks import watching
from dbes.models.load import load_model
from dbes.models.router_mask import routing_masked
from dbes.models.saliency import reap_scores
from dbes.models.sites import expert_modules, find_sites
from dbes.paths.coverage import deal_folds
from dbes.scoring.counting import counts_of
from dbes.scoring.counts import Counts
from dbes.tasks.entries import Entry
from dbes.trace.store import Trace

KEPT = [1, 2, 4, 6, 7]
DROPPED = [0, 3, 5]
REFUSED = {"deepseek_v4": "dropped experts ran all the same", "doge": "sums of two key scores", "zaya": "dropped experts ran all the same"}
"""Families whose routers look experts up by token id, add up the scores of keys, or choose outside of what is seen."""


def tokens() -> Tensor:
    return torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize(("family", "changes"), [
    ("olmoe", {}), ("mixtral", {}), ("gpt_oss", {}), ("qwen3_moe", {"norm_topk_prob": True}), ("deepseek_v3", {"n_group": 1}), ("dbrx", {}),
])  # fmt: skip
def test_a_masked_model_is_the_model_without_these_experts(family: str, changes: dict[str, Any]) -> None:
    whole = exact(families.tiny_model(family, **changes))
    if family == "dbrx":
        small_sizes = {"ffn_config": {**families.SPECIAL["dbrx"]["ffn_config"], "moe_num_experts": len(KEPT)}}
    else:
        small_sizes = {name: len(KEPT) for name in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(whole.config, name)}
    small = exact(families.tiny_model(family, **changes, **small_sizes))
    wanted = {name: tensor.shape for name, tensor in small.state_dict().items()}
    pruned = {name: taken(tensor, wanted[name]) for name, tensor in whole.state_dict().items()}
    small.load_state_dict(pruned)
    before = logits(whole)
    with routing_masked(whole, {site.layer: DROPPED for site in find_sites(whole)}):
        masked = logits(whole)
    rounding = torch.finfo(torch.float32).eps  # some routers compute in float32 whatever the model does
    torch.testing.assert_close(masked, logits(small), rtol=0, atol=rounding)
    assert float((masked - before).abs().max()) > 1000 * rounding and torch.equal(logits(whole), before)


def exact(model: Any) -> Any:
    """In float64, with experts one by one: grouped products know no float64."""
    model.set_experts_implementation("eager")
    return model.double()


def taken(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The rows of the kept experts, where a tensor has rows of every expert."""
    if tensor.shape == shape:
        return tensor
    return tensor.reshape(families.EXPERTS, -1, *tensor.shape[1:])[KEPT].reshape(shape)


@pytest.mark.parametrize("family", families.representatives(families.discovered()))
def test_a_dropped_expert_never_runs_and_as_many_others_do(family: str) -> None:
    model = families.tiny_model(family)
    sites = find_sites(model)
    ran: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), watching(sites, lambda _, made: ran.append((made.ids, made.weights)), scores=False):
        context = routing_masked(model, {site.layer: DROPPED for site in sites})
        if family in REFUSED:
            with pytest.raises(ModelError, match=REFUSED[family]), context:
                logits(model)
            return
        with context:
            assert bool(logits(model).isfinite().all())
    assert len(ran) == len(sites)
    for (ids, weights), site in zip(ran, sites, strict=True):
        assert ids.shape == (40, site.top_k) and not torch.isin(ids, torch.tensor(DROPPED)).any()
        assert all(len(set(row)) == site.top_k for row in ids.tolist()) and bool((weights > 0).any(dim=-1).all())


@pytest.mark.parametrize("block", READ)
def test_experts_that_are_modules_are_masked_too(block: str) -> None:
    torch.manual_seed(0)
    model: Any = MockMoeForCausalLM(MockMoeConfig(block=block)).eval()
    sites = find_sites(model)
    called: set[int] = set()
    for site in sites:
        for number, expert in enumerate(expert_modules(site)):
            expert.register_forward_hook(lambda _, args, __, number=number: called.add(number) if len(args[0]) else None)
    dropped = {site.layer: [0, 3] for site in sites}
    logits(model)
    assert {0, 3} <= called
    called.clear()
    with routing_masked(model, dropped):
        logits(model)
    assert called and not {0, 3} & called


@pytest.mark.parametrize(("layer", "dropped", "told"), [
    (9, [0], "layer 9"), (0, [8], "layer 0"), (0, [0, 1, 2, 3, 4, 5, 6], "1 experts would be left, and every token runs 2"),
])  # fmt: skip
def test_masks_that_no_router_can_follow(layer: int, dropped: list[int], told: str) -> None:
    with pytest.raises(ModelError, match=told), routing_masked(families.tiny_model("olmoe"), {layer: dropped}):
        pass


@torch.no_grad()
def test_reap_is_the_mean_of_gate_times_norm_over_routed_tokens() -> None:
    model = exact(families.tiny_model("olmoe"))
    runs = [tokens()[0].numpy(), tokens()[1, :13].numpy()]
    found = reap_scores(model, runs)
    sums, counts = np.zeros((4, 8)), np.zeros((4, 8))
    blocks = [site.experts for site in find_sites(model)]
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: given.append(args))
    for run in runs:
        given.clear()
        model(input_ids=torch.from_numpy(run)[None], use_cache=False)
        for layer, (hidden, ids, weights) in enumerate(given):
            experts: Any = blocks[layer]
            for row, chosen, gates in zip(hidden, ids.tolist(), weights.tolist(), strict=True):
                for expert, gate in zip(chosen, gates, strict=True):
                    gated, up = (experts.gate_up_proj[expert] @ row).chunk(2)
                    output = experts.down_proj[expert] @ (torch.nn.functional.silu(gated) * up)
                    sums[layer, expert] += gate * math.sqrt(float((output**2).sum()))
                    counts[layer, expert] += 1
    np.testing.assert_allclose(found, sums / np.maximum(counts, 1), rtol=1e-5)


@pytest.mark.parametrize("family", families.representatives(families.discovered()))
def test_reap_is_told_or_refused(family: str) -> None:
    model = families.tiny_model(family)
    if family in ("llama4_text", "doge", "jetmoe"):
        with pytest.raises(ModelError, match="outputs can be had alone"):
            reap_scores(model, [tokens()[0].numpy()])
        return
    found = reap_scores(model, list(tokens().numpy()))
    assert np.isfinite(found).all() and (found >= 0).all() and found.any(axis=1).all()


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    words = ["--model", tiny_checkpoint, "--tasks", tiny_task, "--permutations", 5, "--save-trace", "--output-path", folder]
    assert CliRunner().invoke(app, ["evaluate", *map(str, words)]).exit_code == 0
    return next(folder.rglob("result.json")).parent


@pytest.fixture(scope="module")
def pruning(recorded: Path, tiny_checkpoint: Path, tiny_task: Path) -> Iterator[Pruning]:
    yield prune(recorded, domain="law", model=tiny_checkpoint, tasks=tiny_task, budgets=(0.5, 3))


def test_bits_are_those_of_the_texts_that_did_not_choose(pruning: Pruning, recorded: Path, tiny_checkpoint: Path, tiny_task: Path) -> None:
    counts = counts_of(Trace.load(recorded / "trace"))
    assert pruning.texts == {"law": 6, "code": 6, "math": 6} and pruning.chosen_by == 6 and not pruning.notes
    law = [int(place) for place in np.flatnonzero(counts.shape.document_domain == counts.shape.domains.index("law"))]
    names = [counts.shape.document_ids[place] for place in law]
    side = deal_folds(tuple(names), np.zeros(len(names), int), 2)
    texts = {row["id"]: row["text"] for row in map(json.loads, (tiny_task.parent / "law.jsonl").read_text().splitlines())}
    unseen = [name for name, at in zip(names, side, strict=True) if at == 1]
    loaded = load_model(tiny_checkpoint)
    entries = [Entry(id=name, source=name, segments=((texts[name], True),)) for name in unseen]
    assert measure_texts(loaded.model, loaded.tokenizer, {"law": entries}, length=64)["law"].score.bits_per_byte == pytest.approx(
        pruning.bits_per_byte["law"]
    )
    hits = sum(counts.whole().hits[place] for place, at in zip(law, side, strict=True) if at == 0)
    keep = {layer: sorted(range(8), key=lambda expert: (-row[expert], expert))[:4] for layer, row in enumerate(np.asarray(hits))}
    with routing_masked(loaded.model, {layer: [e for e in range(8) if e not in kept] for layer, kept in keep.items()}):
        pruned = measure_texts(loaded.model, loaded.tokenizer, {"law": entries}, length=64)["law"].score.bits_per_byte
    added = pruning.budgets[0].arms[0].added["law"]
    assert added.value == pytest.approx(pruned - pruning.bits_per_byte["law"], abs=1e-9) and added.low < added.value < added.high


def test_every_arm_is_compared_and_an_untrained_model_has_no_better_choice(pruning: Pruning) -> None:
    for each in pruning.budgets:
        assert [arm.name for arm in each.arms] == ["domain load", "overall load", "reap", "random"]
        assert each.arms[0].finding is None and {arm.finding for arm in each.arms[1:]} <= {"no difference", "better", "worse"}
        for arm in each.arms[1:]:
            assert arm.less is not None
            assert arm.less.value == pytest.approx(each.arms[0].added["law"].value - arm.added["law"].value, abs=1e-9)
    assert pruning.confidence == pytest.approx(1 - 0.05 / 6) and [each.placement.chosen for each in pruning.budgets] == [12, 9]


def test_the_command_says_what_pruning_costs(recorded: Path, tiny_checkpoint: Path, tiny_task: Path, tmp_path: Path) -> None:
    words = [recorded, "--for", "pruning", "--domain", "law", "--model", tiny_checkpoint, "--tasks", tiny_task, "--budget", "0.5"]
    out, page = tmp_path / "kept.json", tmp_path / "page.html"
    done = CliRunner().invoke(app, ["paths", *map(str, words), "--out", str(out), "--output", str(page)])
    assert done.exit_code == 0, done.stderr
    assert "kept by the load of law" in page.read_text() and len(json.loads(out.read_text())["cells"]) == 12
    refused = CliRunner().invoke(app, ["paths", *map(str, words[:-1]), "1"])
    assert refused.exit_code == 1 and "every token runs 2" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_counts_of_whole_domains_cannot_be_pruned_by(tiny_checkpoint: Path, tiny_task: Path) -> None:
    counts = Counts.from_domains(np.full((3, 3, 8), 5), domains=["law", "code", "math"], top_k=2)
    with pytest.raises(PathError, match="no text can be kept from the choice"):
        prune(counts, domain="law", model=tiny_checkpoint, tasks=tiny_task)


@pytest.mark.slow
def test_the_embedded_models_domain_needs_its_own_experts(tmp_path: Path) -> None:
    """Trained with experts that specialize: those of medicine serve its unseen texts better than the most used of all or random ones."""
    import dbes

    result = dbes.evaluate("embedded", limit=16, permutations=5, save_trace=True, output_path=tmp_path)
    found = prune(result, domain="medicine", model="embedded", budgets=(0.5,))
    findings = {arm.name: arm.finding for arm in found.budgets[0].arms}
    assert findings["overall load"] == "better" and findings["random"] in ("better", "no difference")
    assert found.budgets[0].arms[0].added["medicine"].low > 0
