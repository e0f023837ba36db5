"""Routers on stock models: what is prescribed is prescribed, nothing looks ahead, no hook stays, the bias is kept."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dbes.errors import MixError
from dbes.testbed.models import build_model, routers_of
from dbes.testbed.routers import Routing, domain_experts, prefix_mean
from dbes.testbed.settings import ModelSettings, RoutingSettings

TINY = {"vocabulary": 300, "hidden": 32, "layers": 2, "experts": 12, "intermediate": 8, "max_positions": 64}


def tiny(architecture="olmoe", **changes):
    return build_model(ModelSettings(architecture=architecture, **{**TINY, **changes}), seed=0).eval()


def tokens_of(seed=0, sequences=4, length=16):
    return torch.randint(2, 300, (sequences, length), generator=torch.Generator().manual_seed(seed))


def routed(model, settings, tokens, *, domain=None, training=True, seed=0, step=0, domains=4):
    with Routing(model, settings, domains=domains, seed=seed, training=training) as routing, torch.no_grad():
        routing.begin(tokens, domain, step=step)
        logits = model(input_ids=tokens).logits
    return routing, logits


def ids_of(routing):
    return torch.stack([made.ids for made in routing.decisions])


@pytest.mark.parametrize("architecture", ["olmoe", "deepseek_v3"])
def test_watching_changes_nothing_and_leaves_no_hook(architecture):
    model, tokens = tiny(architecture), tokens_of()
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
    _, watched = routed(model, RoutingSettings(balancing="none"), tokens)
    assert torch.equal(plain, watched)
    assert all(not router._forward_hooks for router in routers_of(model))


@pytest.mark.parametrize("architecture", ["olmoe", "deepseek_v3"])
@pytest.mark.parametrize("balancing", ["loss_free", "sinkhorn", "assignment"])
def test_a_balanced_router_is_the_plain_one_when_not_training(architecture, balancing):
    model, tokens = tiny(architecture), tokens_of()
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
    _, measured = routed(model, RoutingSettings(balancing=balancing), tokens, training=False)
    assert torch.allclose(plain, measured, atol=1e-6)


def test_reference_router_stays_in_its_domains_block_and_still_chooses():
    model, tokens = tiny(), tokens_of(sequences=8)
    domain = torch.arange(8) % 4
    routing, _ = routed(model, RoutingSettings(router="reference"), tokens, domain=domain)
    blocks = domain_experts(4, 12, 2)
    assert blocks.sum(1).tolist() == [3, 3, 3, 3]
    for made in routing.decisions:
        by_sequence = made.ids.reshape(8, -1)
        for sequence, block in enumerate(domain):
            assert blocks[block][by_sequence[sequence]].all()
        assert len(set(map(tuple, made.ids.sort(-1).values.tolist()))) > 4, "more than one choice in a block"
        assert torch.isfinite(made.weights).all()


def test_reference_router_needs_more_experts_than_top_k_for_each_domain():
    with pytest.raises(MixError, match="at least 12 experts"):
        domain_experts(4, 8, 2)
    with pytest.raises(MixError, match="more than top_k = 2"):
        Routing(tiny(experts=8), RoutingSettings(router="reference"), domains=4, seed=0)


def test_reference_router_needs_domains():
    with pytest.raises(MixError, match="domain of every sequence"):
        routed(tiny(), RoutingSettings(router="reference"), tokens_of())


def test_prefix_mean_is_the_mean_of_what_came_before():
    logits = torch.randn(6, 3)
    means = prefix_mean(logits, 2)
    naive = torch.cat([torch.stack([part[: place + 1].mean(0) for place in range(3)]) for part in logits.chunk(2)])
    assert torch.allclose(means, naive, atol=1e-6)


def test_sequence_level_routing_never_looks_ahead():
    """Changing a later token changes no earlier route, weight or prediction."""
    model, tokens = tiny(), tokens_of(sequences=2)
    later = tokens.clone()
    later[:, 10:] = (later[:, 10:] + 7) % 290 + 2
    settings = RoutingSettings(router="sequence")
    first, first_logits = routed(model, settings, tokens)
    second, second_logits = routed(model, settings, later)
    for a, b in zip(first.decisions, second.decisions, strict=True):
        assert torch.equal(a.ids.view(2, 16, -1)[:, :10], b.ids.view(2, 16, -1)[:, :10])
    assert torch.allclose(first_logits[:, :10], second_logits[:, :10], atol=1e-6)
    assert not torch.equal(ids_of(first), ids_of(second))


def test_sequence_level_routes_change_less_than_token_routes():
    model, tokens = tiny(router_std=0.5), tokens_of(sequences=4, length=64)

    def repeats(settings):
        ids = ids_of(routed(model, settings, tokens)[0]).sort(-1).values.view(2, 4, 64, 2)
        return float((ids[:, :, 1:] == ids[:, :, :-1]).float().mean())

    assert repeats(RoutingSettings(router="sequence")) > repeats(RoutingSettings(balancing="none")) + 0.2


def test_hash_routing_depends_on_the_token_alone():
    tokens = tokens_of()
    tokens[1] = tokens[0].flip(0)
    settings = RoutingSettings(router="hash", balancing="none")
    routing, _ = routed(tiny(), settings, tokens)
    ids = ids_of(routing).view(2, 4, 16, 2)
    assert torch.equal(ids[:, 0], ids[:, 1].flip(1))
    assert not torch.equal(ids[0], ids[1]), "another table in every layer"
    assert all(len(set(row)) == 2 for row in ids.reshape(-1, 2).tolist())
    assert torch.equal(ids, ids_of(routed(tiny(), settings, tokens)[0]).view(2, 4, 16, 2))
    assert not torch.equal(ids, ids_of(routed(tiny(), settings, tokens, seed=1)[0]).view(2, 4, 16, 2))


def test_frozen_routers_get_no_gradient_and_rerandomised_ones_change_every_step():
    model, tokens = tiny(), tokens_of()
    Routing(model, RoutingSettings(router="frozen", balancing="none"), domains=4, seed=0)
    assert not any(router.weight.requires_grad for router in routers_of(model))
    settings = RoutingSettings(router="rerandomised", balancing="none")
    drawn = [ids_of(routed(tiny(), settings, tokens, step=step)[0]) for step in (3, 4, 3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_dropped_slots_weigh_nothing_and_only_while_training():
    model, tokens = tiny(router_std=1.0), tokens_of(sequences=4, length=32)
    settings = RoutingSettings(balancing="none", scope="sequence", capacity=1.0)
    training, _ = routed(model, settings, tokens)
    assert all(0 < made.dropped < 1 for made in training.decisions)
    made = training.decisions[0]
    assert float((made.weights == 0).float().mean()) == pytest.approx(made.dropped, abs=1e-6)
    measured, _ = routed(model, settings, tokens, training=False)
    assert all(made.dropped == 0 and (made.weights > 0).all() for made in measured.decisions)


def test_loss_free_bias_of_deepseek_survives_save_and_load(tmp_path):
    """It is a buffer of the architecture: a plain checkpoint has it, and the plain model routes by it."""
    model, tokens = tiny("deepseek_v3", router_std=0.5), tokens_of(sequences=8, length=32)
    settings = RoutingSettings(balancing="loss_free", coefficient=0.2)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    for _ in range(5):
        routed(model, settings, tokens)
    bias = routers_of(model)[0].e_score_correction_bias
    assert float(bias.abs().max()) > 0.1
    with torch.no_grad():
        after = model(input_ids=tokens).logits
    assert not torch.allclose(before, after)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(routers_of(loaded)[0].e_score_correction_bias, bias)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=tokens).logits, after, atol=1e-5)


def test_loss_free_bias_without_a_place_in_the_architecture_evens_the_load():
    model, tokens = tiny(router_std=0.5), tokens_of(sequences=8, length=32)
    settings = RoutingSettings(balancing="loss_free", coefficient=0.003)

    def spread(routing):
        return np.mean([float(torch.bincount(made.ids.reshape(-1), minlength=12).float().std()) for made in routing.decisions])

    with Routing(model, settings, domains=4, seed=0) as routing, torch.no_grad():
        spreads = []
        for _ in range(120):
            routing.begin(tokens, None, step=0)
            model(input_ids=tokens)
            spreads.append(spread(routing))
    assert spreads[-1] < 0.5 * spreads[0]
    assert float(routing.bias.abs().max()) > 0


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
@pytest.mark.parametrize("balancing", ["aux_loss", "loss_free", "sinkhorn", "assignment"])
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_every_method_runs_at_every_scope_with_and_without_dropping(scope, balancing, capacity):
    settings = RoutingSettings(balancing=balancing, scope=scope, micro_batch=2, capacity=capacity)
    model, tokens = tiny(), tokens_of()
    with Routing(model, settings, domains=4, seed=0) as routing:
        routing.begin(tokens, None, step=0)
        (model(input_ids=tokens).logits.mean() + routing.balancing_loss()).backward()
    assert len(routing.decisions) == 2
    assert routers_of(model)[0].weight.grad is not None
    assert (float(routing.balancing_loss().detach()) > 0) == (balancing == "aux_loss")


def test_a_model_without_routers_is_refused():
    with pytest.raises(MixError, match="no router"):
        Routing(torch.nn.Linear(2, 2), RoutingSettings(), domains=2, seed=0)


def test_router_initialisation_changes_nothing_else():
    narrow, wide = tiny(router_std=0.02), tiny(router_std="1/sqrt(hidden)")
    for (name, a), (_, b) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert torch.equal(a, b) != name.endswith("mlp.gate.weight")
    assert float(routers_of(wide)[0].weight.detach().std()) == pytest.approx(32**-0.5, rel=0.2)
