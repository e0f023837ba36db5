"""What is recorded is what ran: for every family of transformers, without any formula of its router."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from families import COMPOSITE, EXPERTS, HIDDEN, LAYERS, TOP_K, discovered, representatives, tiny_model
from mock_remote_moe import BLOCKS, READ, Mixtral, MockMoeConfig, MockMoeForCausalLM
from torch import nn

from dbes.errors import ModelError, RecordingError
from dbes.models.doctor import ablation_agrees
from dbes.models.execution import base_of
from dbes.models.hooks import Decision, watching
from dbes.models.sites import find_sites
from dbes.recording.stiffness import Noise, logit_stiffness, noise_keys, noise_rows, selection_stiffness

FAMILIES = discovered()
LOOKED_UP = {"deepseek_v4": {0, 1, 2}}
"""Layers where experts come from a table of token ids: there is no score."""


@functools.cache
def model_of(family: str) -> Any:
    return tiny_model(family)


def text(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


def decisions_of(model: nn.Module, input_ids: torch.Tensor, **options: Any) -> dict[int, list[Decision]]:
    found: dict[int, list[Decision]] = {}
    with (
        torch.inference_mode(),
        watching(find_sites(model), lambda index, decision: found.setdefault(index, []).append(decision), **options),
    ):
        base_of(model)(input_ids=input_ids, use_cache=False)
    return found


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_every_family_is_covered() -> None:
    assert len(FAMILIES) >= 57
    if transformers.__version__.startswith("5.23."):
        assert len(FAMILIES) == 57
        assert len(set(FAMILIES) | set(COMPOSITE)) == 62


@pytest.mark.parametrize("family", representatives(FAMILIES))
def test_changing_one_expert_changes_exactly_the_recorded_rows(family: str) -> None:
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for site in find_sites(model):
        assert ablation_agrees(model, site, text()), f"layer {site.layer}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_every_expert_passes_the_ablation(expert: int) -> None:
    for family in ("olmoe", "dbrx", "longcat_flash"):
        model = model_of(family)
        assert all(ablation_agrees(model, site, text(), expert=expert) for site in find_sites(model))


def test_the_ablation_notices_wrong_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    from dbes.models import hooks as reading

    def shifted(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = read(*given)
        return (ids + 1) % EXPERTS, weights

    read = reading.READERS["experts"]
    monkeypatch.setitem(reading.READERS, "experts", shifted)
    model = model_of("olmoe")
    assert not any(ablation_agrees(model, site, text()) for site in find_sites(model))


@pytest.mark.parametrize("family", representatives(FAMILIES))
def test_every_site_is_seen_once_and_the_model_is_untouched(family: str) -> None:
    model, input_ids = model_of(family), text()
    sites, hooked = find_sites(model), hooks(model)
    found: dict[int, list[Decision]] = {}
    with torch.inference_mode():
        plain = model(input_ids=input_ids, use_cache=False).logits
        with watching(sites, lambda index, decision: found.setdefault(index, []).append(decision)):
            watched = model(input_ids=input_ids, use_cache=False).logits
    assert torch.equal(plain, watched)
    assert hooks(model) == hooked
    assert sorted(found) == list(range(len(sites))) and all(len(seen) == 1 for seen in found.values())
    for site, index in zip(sites, range(len(sites)), strict=True):
        ids = found[index][0].ids
        assert ids.shape == (input_ids.numel(), site.top_k)
        assert int(ids.min()) >= 0 and int(ids.max()) < site.num_experts + site.zero_experts
    stopped = decisions_of(model, input_ids, stop=True)
    assert all(torch.equal(stopped[index][0].ids, found[index][0].ids) for index in found)


@pytest.mark.parametrize("family", representatives(FAMILIES))
def test_scores_are_those_the_top_k_was_taken_on(family: str) -> None:
    """Exact in every family but where there is no score: a table of token ids (deepseek_v4), product keys (doge)."""
    model = model_of(family)
    sites = find_sites(model)
    for index, (decision,) in decisions_of(model, text()).items():
        site = sites[index]
        if family == "doge" or site.layer in LOOKED_UP.get(family, ()):
            assert decision.scores is None and decision.matched is None
            continue
        assert decision.scores is not None and decision.matched is not None and bool(decision.matched.all())
        best = decision.scores.topk(site.top_k, dim=-1)[1].sort(dim=-1)[0]
        assert torch.equal(best, decision.choice.sort(dim=-1)[0])
        assert decision.logits is not None and decision.logits.shape[-1] >= site.num_experts


@torch.inference_mode()
def test_group_limited_scores_and_logits_by_hand() -> None:
    """DeepSeek-V3: sigmoid of the logits plus bias, two groups of four, one of them allowed."""
    model = model_of("deepseek_v3")
    site = find_sites(model)[0]
    decision = decisions_of(model, text())[0][0]
    gate: Any = site.router
    logits = decision.hidden.float() @ gate.weight.float().T
    assert torch.allclose(decision.logits, logits, atol=1e-6)
    biased = logits.sigmoid() + gate.e_score_correction_bias
    groups = biased.reshape(-1, 2, 4).topk(2, dim=-1)[0].sum(dim=-1)
    allowed = (groups.argmax(dim=-1)[:, None] == torch.arange(2)).repeat_interleave(4, dim=1)
    assert torch.equal(decision.scores.isneginf(), ~allowed) and torch.equal(decision.blocked, ~allowed)
    assert torch.allclose(decision.scores[allowed], biased[allowed], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("olmoe", (0, 1, 2, 3)),
        ("deepseek_v3", (1, 2, 3)),
        ("jamba", (1, 3)),
        ("beam", (3,)),
        ("nemotron_h", (1, 3)),
        ("longcat_flash", (0, 1)),
        ("jetmoe", (0, 1, 2, 3)),
    ],
)
def test_layer_numbers_are_the_models_own(family: str, layers: tuple[int, ...]) -> None:
    assert tuple(site.layer for site in find_sites(model_of(family))) == layers


def test_zero_computation_and_skipped_slots_are_told_apart() -> None:
    longcat = find_sites(model_of("longcat_flash"))[0]
    assert (longcat.num_experts, longcat.zero_experts) == (EXPERTS, 4)
    assert bool((decisions_of(model_of("longcat_flash"), text(8))[0][0].ids >= EXPERTS).any())
    skips = [decision.weights == 0 for (decision,) in decisions_of(model_of("zaya"), text(16)).values()]
    assert any(bool(skip.any()) for skip in skips)


def test_a_composite_model_is_found_with_its_layers() -> None:
    config = transformers.Llama4Config(
        text_config=transformers.Llama4TextConfig(
            hidden_size=HIDDEN, intermediate_size=16, intermediate_size_mlp=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=1, vocab_size=128, pad_token_id=0,
        ).to_dict(),
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 28,
            "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        },
    )  # fmt: skip
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    sites = find_sites(model)
    assert all(bool(decision.matched.all()) for (decision,) in decisions_of(model, text()).values())
    assert ablation_agrees(model, sites[1], text())
    assert [(site.layer, site.num_experts, site.top_k, site.adapter) for site in sites] == [(0, 8, 1, "scores"), (1, 8, 1, "scores")]


def remote(block: str, *, top_k: int | None = None) -> MockMoeForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        slots = top_k or (1 if block in ("switch", "argmax") else 2)
        return MockMoeForCausalLM(MockMoeConfig(block=block, num_experts_per_tok=slots)).eval()


class TestExpertsThatAreModules:
    """A ModuleList of experts that the block loops over, with whatever gate, as checkpoints bring along."""

    @pytest.mark.parametrize("block", READ)
    def test_sites(self, block: str) -> None:
        sites = find_sites(remote(block))
        slots = 1 if block in ("switch", "argmax") else 2
        found = [(site.layer, site.num_experts, site.top_k, site.adapter) for site in sites]
        assert found == [(1, 8, slots, "modules"), (2, 8, slots, "modules")]

    @pytest.mark.parametrize("block", [block for block in READ if block != "noisy"])
    def test_changing_one_expert_changes_exactly_the_recorded_rows(self, block: str) -> None:
        model = remote(block)
        for site in find_sites(model):
            assert all(ablation_agrees(model, site, text(), expert=expert) for expert in (0, EXPERTS - 1))

    @pytest.mark.parametrize("block", [block for block in READ if issubclass(READ[block], Mixtral)])
    @pytest.mark.parametrize("scores", [True, False])
    def test_ids_and_weights_are_those_the_block_chose(self, block: str, scores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        model, chosen = remote(block), []
        kind = READ[block]
        choose = kind.choose
        monkeypatch.setattr(kind, "choose", lambda self, logits: chosen.append(choose(self, logits)) or chosen[-1])
        proven: dict[tuple[int, int], int] = {}
        for seed in range(2):  # the second time nothing is proven again
            chosen.clear()
            torch.manual_seed(seed)  # one block draws noise
            found = decisions_of(model, text(seed=seed), scores=scores, proven=proven)
            assert len(proven) == 2
            first = chosen[:: 1 if seed else 3]  # the block runs twice more for the proof
            for (decision,), (ids, weights) in zip(found.values(), first, strict=True):
                assert torch.equal(decision.ids, ids) and torch.equal(decision.weights, weights)
                assert decision.hidden is not None and len(decision.hidden) == len(ids)
                assert (decision.scores is not None) == (decision.logits is not None) == scores
                if scores:
                    assert bool(decision.matched.all())

    @pytest.mark.parametrize("block", READ)
    def test_the_model_is_untouched(self, block: str) -> None:
        model, input_ids = remote(block), text()
        state = torch.get_rng_state()
        with torch.inference_mode():
            plain = model(input_ids=input_ids).logits
            torch.set_rng_state(state)
            with watching(find_sites(model), lambda *_: None):
                watched = model(input_ids=input_ids).logits
        assert torch.equal(plain, watched) and hooks(model) == 0

    def test_a_shared_prefix_of_documents_is_no_trouble(self) -> None:
        model = remote("sorted")
        same = text(1).expand(3, -1)  # every row of the batch three times
        assert all(bool(decision.matched.all()) for (decision,) in decisions_of(model, same).values())

    @pytest.mark.parametrize(
        ("block", "told"),
        [
            ("dense", r"layer 1 \(model.layers.1.mlp: Dense, Linear, ModuleList\): unsupported routing contract: .*384 rows of 48 tokens"),
            ("capacity", "its experts were given 24 rows"),
            ("remapped", "which is not what the choice seen last gives them"),
            ("hidden", "no weights that were seen before they ran add their outputs up"),
        ],
    )
    def test_what_cannot_be_shown_to_have_run_is_refused(self, block: str, told: str) -> None:
        model = remote(block)
        with pytest.raises(RecordingError, match=told):
            decisions_of(model, text())
        assert hooks(model) == 0 and torch.overrides._get_current_function_mode_stack() == []

    def test_a_gate_without_ids_is_refused(self) -> None:
        model = remote("gate")
        model.model.layers[1].mlp.gate.forward = lambda hidden: (torch.zeros(hidden.shape[:2].numel(), 2), torch.ones(48, 2), None)
        with pytest.raises(RecordingError, match=r"layer 1 .*no top-2 over 8 experts was seen before they ran"):
            decisions_of(model, text())

    def test_experts_in_one_tensor_are_refused_also_beside_layers_that_can_be_read(self) -> None:
        with pytest.raises(ModelError, match=r"unsupported routing contract: model.layers.1.mlp \(Einsum\)"):
            find_sites(remote("einsum"))
        model = remote("mixtral")
        model.model.layers[2].mlp = BLOCKS["einsum"](model.config)
        with pytest.raises(ModelError, match=r"unsupported routing contract: model.layers.2.mlp \(Einsum\)"):
            find_sites(model)


@pytest.mark.parametrize("block", ["in place", "in place, fused"])
def test_work_in_place_after_the_choice_changes_nothing_that_was_seen(block: str) -> None:
    """The gate goes on with its scores, ids and input; the block with its weights: what was seen stays."""
    model = remote(block)
    (decision,) = decisions_of(model, text())[0]
    for layer in model.model.layers[1:]:
        layer.mlp.spoil = False
    (expected,) = decisions_of(model, text())[0]
    for name in ("ids", "weights", "hidden", "scores", "choice", "logits"):
        assert torch.equal(getattr(decision, name), getattr(expected, name)), name
    assert bool(decision.matched.all()) and bool(expected.matched.all())


def test_disagreement_with_the_config_is_refused() -> None:
    model = tiny_model("olmoe")
    model.config.num_experts = 9
    with pytest.raises(ModelError, match=r"layer 0 .*8 experts, the config says \[9\]"):
        find_sites(model)
    model.config.num_experts = EXPERTS
    model.config.num_experts_per_tok = 3
    with pytest.raises(ModelError, match=r"layer 0 .*chooses 2 experts per token, the config says \[3\]"):
        find_sites(model)


def test_dense_and_bypassed_models_are_refused() -> None:
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    with pytest.raises(ModelError, match="LlamaForCausalLM is not a Mixture-of-Experts model"):
        find_sites(transformers.LlamaForCausalLM(config))
    model = tiny_model("olmoe")
    model._use_kernels = True
    with pytest.raises(ModelError, match="use_kernels"):
        find_sites(model)


def test_no_hook_stays_behind_when_the_forward_fails() -> None:
    model = model_of("olmoe")
    hooked = hooks(model)
    with pytest.raises(ZeroDivisionError), torch.inference_mode(), watching(find_sites(model), lambda *_: 1 / 0):
        model(input_ids=text())
    assert hooks(model) == hooked
    assert torch.overrides._get_current_function_mode_stack() == []


def test_gradient_checkpointing_is_counted_once() -> None:
    model = tiny_model("olmoe").train()
    model.activation_checkpointing_enable()
    seen: list[int] = []
    with watching(find_sites(model), lambda index, _: seen.append(index)):
        model(input_ids=text(), labels=text()).loss.backward()
    assert sorted(seen) == list(range(LAYERS))


def test_selection_stiffness_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    choice = torch.tensor([[0, 1]])
    std = float(torch.tensor([0.5, 0.3, 0.2, 0.0]).std(correction=0))
    calm, wild = torch.zeros(1, 4), torch.tensor([[0.0, -100.0, 100.0, 0.0]])
    margin, scaled, kept = selection_stiffness(scores, choice, calm, None)
    assert margin.item() == pytest.approx(0.1) and scaled.item() == pytest.approx(0.1 / std)
    assert kept.tolist() == [[2, 2, 2, 2]]
    # 0.3 - 100 s std falls below 0.2 + 100 s std once s > 0.1 / (200 std) = 0.0028
    assert selection_stiffness(scores, choice, wild, None)[2].tolist() == [[2, 2, 1, 1]]


def test_what_a_group_limit_took_out_stays_out() -> None:
    scores = torch.tensor([[0.5, 0.3, -torch.inf, -torch.inf], [0.5, 0.3, 0.1, -torch.inf]])
    choice = torch.tensor([[0, 1], [0, 1]])
    noise = torch.tensor([[-1e6, 0.0, 1e6, 1e6]]).repeat(2, 1)
    margin, scaled, kept = selection_stiffness(scores, choice, noise, None)
    assert margin[0].isnan() and scaled[0].isnan() and kept[0].tolist() == [2, 2, 2, 2]  # nothing left to reject
    assert margin[1].item() == pytest.approx(0.2) and kept[1].tolist() == [1, 1, 1, 1]
    filled = torch.tensor([[0.5, 0.3, 0.0, 0.0], [0.5, 0.3, 0.1, 0.0]])
    blocked = scores.isneginf()
    margin, scaled, kept = selection_stiffness(filled, choice, noise, blocked)
    assert margin[0].item() == pytest.approx(0.3)  # the top-k did see the zeros
    assert scaled[0].item() == pytest.approx(0.3 / 0.1) and kept[0].tolist() == [2, 2, 2, 2]


def test_logit_stiffness_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 1.0, 2.0, -1.0]])
    margin, bits = logit_stiffness(logits, torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.0, -1.0, 1.0]]).repeat(2, 1))
    assert margin.tolist() == [0.5, -2.0]  # the second was not selected by its logits
    # 1 - eps > 0.5 + eps holds for 0.01 and 0.1, not for 1
    assert bits.tolist() == [0b011, 0]


def test_noise_depends_on_document_position_and_layer_alone() -> None:
    import numpy as np

    def rows(document: str, positions: np.ndarray, layers: tuple[int, ...]) -> np.ndarray:
        return np.stack([noise_rows(noise_keys(document, positions), layer) for layer in layers])

    whole = rows("d1", np.arange(50), (0, 3))
    assert np.array_equal(whole[:, 20:], rows("d1", np.arange(20, 50), (0, 3)))
    assert not np.array_equal(whole[0], whole[1]) and not np.array_equal(whole, rows("d2", np.arange(50), (0, 3)))
    many = rows("d1", np.arange(200_000), (5,))
    counts = np.bincount(many[0], minlength=4096)
    assert counts.min() > 0 and counts.std() < 1.2 * np.sqrt(counts.mean())
    noise = Noise.drawn(classes=64, slots=8, seed=0)
    assert abs(float(noise.normal.mean())) < 0.01 and float(noise.normal.std()) == pytest.approx(1, abs=0.01)
    assert torch.equal(noise.normal, Noise.drawn(classes=64, slots=8, seed=0).normal)


@pytest.mark.parametrize("document", ["d1", "", "another text", "\u00fc" * 40])
def test_rows_of_noise_are_a_hash_in_whole_numbers_on_every_device(document: str) -> None:
    """splitmix64's finalizer, written with Python's own numbers."""
    import zlib

    import numpy as np

    positions = np.r_[np.arange(40), 2**31 - 1]
    keys = noise_keys(document, positions)
    for layer in (0, 1, 7, 93, 2**20):
        expected = []
        for position in positions.tolist():
            mixed = (((zlib.crc32(document.encode()) << 32) + position) * 0x9E3779B97F4A7C15 + layer * 0xC2B2AE3D27D4EB4F) % 2**64
            mixed = (mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9 % 2**64
            expected.append((mixed >> 52) % 4096)
        assert noise_rows(keys, layer).tolist() == noise_rows(torch.from_numpy(keys), layer).tolist() == expected


def test_a_decision_is_a_value() -> None:
    decision = decisions_of(model_of("olmoe"), text())[0][0]
    assert replace(decision, hidden=None).hidden is None and decision.hidden.shape[1] == HIDDEN
    assert decision.ids.shape[1] == TOP_K
