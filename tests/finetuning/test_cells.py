"""Chosen experts alone: both methods give the same weights, nothing else changes by a bit, and the model is left as it was."""

import copy
import hashlib

import pytest
import torch
from families import VOCABULARY, discovered, representatives, tiny_model
from rounding import FACTOR, allowance, assert_rounding_only, exact

from dbes.errors import FinetuneError
from dbes.finetuning.cells import TrainableCells
from dbes.models.sites import expert_slices, find_sites

INTERFACE = (
    "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "glm4_moe", "gpt_oss", "granitemoe", "jamba",
    "nemotron_h", "aria_text", "phimoe", "gemma4_text", "hunyuan_v1_moe", "minimax_m2",
)  # fmt: skip
"""Families whose experts modules have transformers' interface: biases, interleaved and transposed layouts, no gate, own gating."""

OTHERS = ("llama4_text", "jetmoe", "dbrx", "doge", "longcat_flash")
"""Families without it: scores in place of ids, sorted slots, flat weights, rows of an embedding, rows of zero experts."""


RATE, EPSILON, STEPS = 1e-3, 1e-4, 2
"""Of the AdamW that trains here: one step moves a weight by at most RATE / EPSILON times what its gradient is off."""


def tokens(seed=0, shape=(2, 24)):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def used_cells(model, ids, *, per_layer=2, layers=2):
    """Cells that got tokens, of the first and last layers: by the rows whose gradient is not zero."""
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    sites = find_sites(model)
    cells = []
    for site in list(dict.fromkeys((sites[0], sites[-1])))[:layers]:
        seen = [
            expert for expert in range(site.num_experts) if all(cut(parameter.grad).any() for parameter, cut in expert_slices(site, expert))
        ]
        cells += [(site.layer, expert) for expert in seen[:per_layer]]
    model.zero_grad()
    for parameter, flag in zip(model.parameters(), before, strict=True):
        parameter.requires_grad_(flag)
    return cells


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def other_digests(model, cells):
    """Hash of every tensor of the checkpoint with the rows of the cells set to zero."""
    chosen = {}
    for site in find_sites(model):
        for layer, expert in cells:
            if layer == site.layer:
                for parameter, cut in expert_slices(site, expert):
                    chosen.setdefault(id(parameter), []).append(cut)
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kept = tensor.detach().clone()
        for cut in chosen.get(id(tensor), ()):
            cut(kept).zero_()
        found[name] = digest(kept)
    return found


def rows_of(model, cells):
    sites = {site.layer: site for site in find_sites(model)}
    return [cut(parameter.data).clone() for layer, expert in cells for parameter, cut in expert_slices(sites[layer], expert)]


def trained(model, cells, ids, **named):
    """The chosen rows after some AdamW steps with weight decay, and the gradients of the first step."""
    with TrainableCells(model, cells, **named) as training:
        optimizer = torch.optim.AdamW(training.parameters(), lr=RATE, weight_decay=0.1, eps=EPSILON)
        gradients = {}
        for step in range(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
            if not step:
                gradients = {name: leaf.grad.clone() for name, leaf in training.named_parameters() if leaf.grad is not None}
            training.drop_empty_gradients()
            optimizer.step()
            optimizer.zero_grad()
        state = training.optimizer_bytes(optimizer), training.chosen_bytes
        training.merge()
    return rows_of(model, cells), gradients, state


@pytest.mark.parametrize("family", representatives([*INTERFACE, *OTHERS]))
@pytest.mark.parametrize("rank", [None, 2], ids=["full", "rank2"])
def test_the_methods_agree_and_nothing_else_moves(family, rank):
    model, ids = tiny_model(family), tokens()
    if rank and family == "doge":
        with pytest.raises(FinetuneError, match="vectors only"), TrainableCells(model, [(0, 0)], rank=2):
            pass
        return
    cells = used_cells(model, ids)
    others, base, results = other_digests(model, cells), rows_of(model, cells), {}
    methods = ("split_bank", "view_leaves") if family in INTERFACE else ("view_leaves",)
    for method in methods:
        mine = copy.deepcopy(model)
        rows, gradients, (state, chosen) = trained(mine, cells, ids, method=method, rank=rank)
        assert other_digests(mine, cells) == others
        assert state == 2 * chosen
        assert all(not torch.equal(row, was) for row, was in zip(rows, base, strict=True) if rank is None or row.ndim == 2)
        results[method] = rows, gradients
    plain, truth = full_gradients(model, cells, ids), full_gradients(exact(model), cells, ids)
    off = max(allowance(plain[name], truth[name]) for name in truth)
    for method, (rows, gradients) in results.items():
        if rank is None:
            assert gradients.keys() == truth.keys()
            for name, gradient in gradients.items():
                assert_rounding_only(gradient, plain[name], truth[name], (method, name))
        for one, other in zip(rows, results["view_leaves"][0], strict=True):
            moved = STEPS * RATE / EPSILON * off + FACTOR * torch.finfo(one.dtype).eps * float(other.abs().max())
            assert float((one - other).abs().max()) <= moved, method


def full_gradients(model, cells, ids):
    """The rows of the cells in the gradient of plain full training."""
    model = copy.deepcopy(model).requires_grad_(True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    model(input_ids=ids, labels=ids).loss.backward()
    sites = {site.layer: site for site in find_sites(model)}
    return {
        f"{names[id(parameter)]}[{expert}]": cut(parameter.grad)
        for layer, expert in cells
        for parameter, cut in expert_slices(sites[layer], expert)
    }


@pytest.mark.parametrize("family", representatives([*INTERFACE, *OTHERS]))
def test_before_the_first_step_the_logits_are_the_base_models(family):
    model, ids = tiny_model(family), tokens()
    cells = used_cells(model, ids)
    with torch.no_grad():
        base, truth = model(input_ids=ids).logits, exact(model)(input_ids=ids).logits
        for rank in (None, 2) if family != "doge" else (None,):
            with TrainableCells(model, cells, rank=rank):
                assert_rounding_only(model(input_ids=ids).logits, base, truth, rank)
        assert torch.equal(model(input_ids=ids).logits, base)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_with_two_threads_the_first_logits_differ_by_rounding_only(family):
    model, ids = tiny_model(family), tokens()
    cells = used_cells(model, ids)
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            base, truth = model(input_ids=ids).logits, exact(model)(input_ids=ids).logits
            with TrainableCells(model, cells):
                assert_rounding_only(model(input_ids=ids).logits, base, truth)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["split_bank", "view_leaves"])
@pytest.mark.parametrize("rank", [None, 2])
def test_without_merge_the_model_is_left_as_it_was(method, rank):
    model, ids = tiny_model("gpt_oss"), tokens()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: digest(value) for name, value in model.state_dict().items()}
    implementation = model.get_experts_implementation()
    cells = used_cells(model, ids)
    with TrainableCells(model, cells, method=method, rank=rank) as training:
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2)
        before = model(input_ids=ids, labels=ids).loss
        before.backward()
        optimizer.step()
        assert model(input_ids=ids, labels=ids).loss < before
        assert model.state_dict().keys() == state.keys()
    assert {name: digest(value) for name, value in model.state_dict().items()} == state
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.get_experts_implementation() == implementation
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not any("dbes" in name for name in vars(module))
    assert not any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters())


@pytest.mark.parametrize("method", ["split_bank", "view_leaves"])
def test_an_error_inside_the_block_leaves_the_model_as_it_was_too(method):
    model = tiny_model("olmoe")
    base = {name: digest(value) for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), TrainableCells(model, [(0, 1)], method=method) as training:
        with torch.no_grad():
            for leaf in training.parameters():
                leaf.add_(1)
        raise KeyboardInterrupt
    assert {name: digest(value) for name, value in model.state_dict().items()} == base
    assert model.get_experts_implementation() == {"": "grouped_mm"}


@pytest.mark.parametrize("method", ["split_bank", "view_leaves"])
def test_an_expert_without_a_token_in_a_step_does_not_move(method):
    model = tiny_model("olmoe")
    site = find_sites(model)[0]
    many, few = tokens(0, (2, 40)), tokens(1, (1, 2))
    chosen = []
    handle = site.experts.register_forward_pre_hook(lambda _, args: chosen.append(set(args[1].flatten().tolist())))
    model(many), model(few)
    handle.remove()
    idle = min(chosen[0] - chosen[1])
    busy = min(chosen[0] & chosen[1])
    with TrainableCells(model, [(0, idle), (0, busy)], method=method) as training:
        leaves = dict(training.named_parameters())
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2, weight_decay=0.5)
        model(input_ids=many, labels=many).loss.backward()
        optimizer.step()  # both have momentum from here on
        optimizer.zero_grad()
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        model(input_ids=few, labels=few).loss.backward()
        optimizer.step()
        for name, leaf in leaves.items():
            assert torch.equal(leaf, before[name]) == (f"[{idle}]" in name), name
        training.merge()


@pytest.mark.parametrize("method", ["split_bank", "view_leaves"])
def test_merge_changes_no_logit_and_training_goes_on_after_it(method):
    model, ids = tiny_model("qwen3_moe"), tokens()
    cells = used_cells(model, ids)
    for rank in (None, 2):
        before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        with TrainableCells(model, cells, method=method, rank=rank) as training:
            optimizer = torch.optim.SGD(training.parameters(), lr=0.5)
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                with torch.no_grad():
                    inside = model(input_ids=ids).logits
                    training.merge()
                    merged = model(input_ids=ids).logits
        with torch.no_grad():
            plain, truth = model(input_ids=ids).logits, exact(model)(input_ids=ids).logits
            for logits in (inside, merged):
                assert_rounding_only(logits, plain, truth)
        changed = {name: tensor.flatten(1) != before[name].flatten(1) for name, tensor in model.named_parameters() if tensor.ndim == 3}
        rows = {(int(name.split(".")[2]), int(expert)) for name, found in changed.items() for expert in found.any(1).nonzero()}
        assert rows == set(cells)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters() if tensor.ndim != 3)


@pytest.mark.parametrize("method", ["split_bank", "view_leaves"])
def test_accumulated_gradients_are_those_of_the_large_batch(method):
    model, ids = tiny_model("deepseek_v3"), tokens(shape=(4, 16))
    cells = used_cells(model, ids)
    plain, truth = full_gradients(model, cells, ids), full_gradients(exact(model), cells, ids)
    for parts in (1, 4):
        with TrainableCells(model, cells, method=method) as training:
            for part in ids.chunk(parts):
                (model(input_ids=part, labels=part).loss / parts).backward()
            gradients = {name: leaf.grad for name, leaf in training.named_parameters() if leaf.grad is not None}
        assert gradients.keys() == truth.keys()
        for name, gradient in gradients.items():
            assert_rounding_only(gradient, plain[name], truth[name], (parts, name))


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "rank2"])
@pytest.mark.parametrize("method", ["split_bank", "view_leaves"])
def test_gradient_checkpointing_changes_no_gradient(method, rank):
    """Neither embeddings nor other layers require gradients here, with which reentrant checkpointing would give none at all."""
    model, ids = tiny_model("olmoe").train(), tokens()
    cells, gradients, passes = used_cells(model, ids), [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        passes.append(0)

        def count(*_):
            passes[-1] += 1

        with TrainableCells(model, cells, method=method, rank=rank) as training:
            assert not model.get_input_embeddings().weight.requires_grad
            for name, leaf in training.named_parameters():
                if name.endswith((".up", ".down")):  # one factor starts at zero and hides the other's gradient
                    torch.nn.init.normal_(leaf, std=0.1, generator=torch.Generator().manual_seed(len(name)))
            handle = model.model.layers[0].input_layernorm.register_forward_hook(count)
            model(input_ids=ids, labels=ids).loss.backward()
            handle.remove()
            gradients.append([leaf.grad for leaf in training.parameters()])
    assert passes == [1, 2], "with checkpointing the layer is computed again in the backward pass"
    assert all(leaf is not None and leaf.any() for leaf in gradients[1])
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", ["split_bank", "view_leaves"])
def test_sixteen_bit_weights_are_trained_through_float32_copies(method):
    model, ids = tiny_model("gpt_oss").to(torch.bfloat16), tokens()
    cells = used_cells(model, ids)
    others = other_digests(model, cells)
    with TrainableCells(model, cells, method=method) as training:
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-5, weight_decay=0.1)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(leaf.dtype == torch.float32 for leaf in training.parameters())
        assert training.optimizer_bytes(optimizer) == 2 * training.chosen_bytes
        training.merge()
        for name, leaf in training.named_parameters():
            parameter, expert = name.removesuffix("]").split("[")
            assert torch.equal(dict(model.named_parameters())[parameter][int(expert)], leaf.to(torch.bfloat16))
    assert other_digests(model, cells) == others


def test_routers_train_only_when_asked():
    model, ids = tiny_model("olmoe"), tokens()
    cells = used_cells(model, ids, layers=1)
    with TrainableCells(model, cells, train_router=True) as training:
        names = [name for name, _ in training.named_parameters()]
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        training.merge()
        router = training.trained_routers()
    assert [name for name in names if "gate." in name] == ["model.layers.0.mlp.gate.weight"]
    assert torch.equal(router["model.layers.0.mlp.gate.weight"], model.model.layers[0].mlp.gate.weight)
    fresh = tiny_model("olmoe")
    assert not torch.equal(model.model.layers[0].mlp.gate.weight, fresh.model.layers[0].mlp.gate.weight)
    assert torch.equal(model.model.layers[1].mlp.gate.weight, fresh.model.layers[1].mlp.gate.weight)


@pytest.mark.parametrize(
    ("cells", "named", "message"),
    [
        ([], {}, "path is empty"),
        ([(0, 8)], {}, r"experts 0 to 7, not 8: is it the path of another model\?"),
        ([(9, 0)], {}, r"layer 9 routes to no experts; this model's MoE layers are 0, 1, 2, 3"),
        ([(0, 1), (0, 1)], {}, "expert 1 of layer 0 twice"),
        ([(0, 1)], {"rank": 0}, "at least 1"),
        ([(0, 1)], {"method": "magic"}, "expected auto"),
    ],
)
def test_cells_that_do_not_fit_are_refused(cells, named, message):
    with pytest.raises(FinetuneError, match=message):
        TrainableCells(tiny_model("olmoe"), cells, **named)


def test_a_split_bank_needs_the_experts_interface():
    with pytest.raises(FinetuneError, match="Llama4TextExperts has no experts interface"):
        TrainableCells(tiny_model("llama4_text"), [(1, 0)], method="split_bank")
    assert TrainableCells(tiny_model("jetmoe"), [(1, 0)]).method == "view_leaves"
    assert TrainableCells(tiny_model("olmoe"), [(1, 0)]).method == "split_bank"


def test_two_blocks_on_one_model_are_refused():
    model = tiny_model("olmoe")
    with TrainableCells(model, [(0, 0)]), pytest.raises(FinetuneError, match="other cells of this model"), TrainableCells(model, [(1, 0)]):
        pass
    assert model.get_experts_implementation() == {"": "grouped_mm"}


def test_offloaded_and_quantized_weights_are_refused():
    model = tiny_model("olmoe").to("meta")
    with pytest.raises(FinetuneError, match="offloaded"), TrainableCells(model, [(0, 0)]):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("family", discovered())
def test_every_family_trains(family):
    model, ids = tiny_model(family), tokens()
    cells = used_cells(model, ids)
    others, base = other_digests(model, cells), rows_of(model, cells)
    rows, _, (state, chosen) = trained(model, cells, ids)
    assert other_digests(model, cells) == others
    assert state == 2 * chosen
    assert not any(torch.equal(row, was) for row, was in zip(rows, base, strict=True))
