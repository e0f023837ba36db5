"""Protected updates: second moments as of a naive loop, texts of other domains hardly feel the training, all else holds as before."""

import numpy as np
import pytest
import scipy.linalg
import torch
from families import VOCABULARY, representatives, tiny_model
from test_cells import digest, other_digests, rows_of, tokens, used_cells
from test_run import run, same_weights, settings  # noqa: F401

from dbes.errors import FinetuneError
from dbes.finetuning import training as training_module
from dbes.finetuning.cells import TrainableCells
from dbes.finetuning.protection import inverse_root
from dbes.models.encoding import full_rows
from dbes.models.sites import find_sites

FAMILIES = (
    "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "jamba", "nemotron_h",
    "phimoe",
)  # fmt: skip
FLOOR = 0.05


def texts(count=2, seed=10):
    """Two protected domains of different size; the first token of a domain's rows tells it."""
    return {name: [tokens(seed + index, (2 + index, 24))] for index, name in enumerate("ab"[:count])}


def naive_moments(model, cells, by_domain):
    """{(layer, expert): (of gate_up_proj, of down_proj)} of an OLMoE, token by token, written from its definition."""
    sites = {site.layer: site for site in find_sites(model)}
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    found = {cell: [np.zeros((hidden, hidden)), np.zeros((inner, inner))] for cell in cells}
    for batches in by_domain.values():
        total = sum(batch.numel() for batch in batches)
        for batch in batches:
            seen = {}
            handles = [
                site.experts.register_forward_pre_hook(lambda _, given, layer=layer, seen=seen: seen.__setitem__(layer, given))
                for layer, site in sites.items()
            ]
            with torch.no_grad():
                model(input_ids=batch)
            for handle in handles:
                handle.remove()
            for layer, (states, ids, weights) in seen.items():
                gate_up = sites[layer].experts.gate_up_proj.detach().double().numpy()
                for state, chosen, gates in zip(states.double().numpy(), ids.tolist(), weights.double().tolist(), strict=True):
                    for expert, gate in zip(chosen, gates, strict=True):
                        if (layer, expert) in found:
                            both = gate_up[expert] @ state
                            inside = both[:inner] / (1 + np.exp(-both[:inner])) * both[inner:]
                            found[layer, expert][0] += gate**2 * np.outer(state, state) / total / len(by_domain)
                            found[layer, expert][1] += gate**2 * np.outer(inside, inside) / total / len(by_domain)
    return found


def test_the_shape_is_the_inverse_root_of_the_naive_second_moment():
    model = tiny_model("olmoe").eval()
    cells = used_cells(model, texts()["a"][0])
    moments = naive_moments(model, cells, texts())
    with TrainableCells(model, cells) as training:
        training.protect(texts(), floor=FLOOR)
        for position, kind in enumerate(("gate_up_proj", "down_proj")):
            scale = FLOOR * np.mean([moments[cell][position].diagonal().mean() for cell in cells])
            for tensor in (tensor for tensor in training._tensors if tensor.kind == kind):
                moment = moments[tensor.cell.layer, tensor.cell.expert][position]
                expected = scipy.linalg.inv(scipy.linalg.sqrtm(moment / scale + np.eye(len(moment))))
                np.testing.assert_allclose(tensor.shaping.numpy(), expected, atol=2e-5)


def test_inverse_root_of_a_diagonal_and_of_any_matrix():
    torch.testing.assert_close(inverse_root(torch.diag(torch.tensor([0.0, 3.0, 8.0])), 1.0), torch.diag(torch.tensor([1.0, 1 / 2, 1 / 3])))
    some = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    root = inverse_root((some.T @ some).double(), 0.5)
    product = root @ (some.T @ some / 0.5 + torch.eye(4)).double() @ root
    torch.testing.assert_close(product, torch.eye(4).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", representatives(FAMILIES))
def test_step_0_is_the_base_nothing_else_moves_and_the_optimizer_is_no_larger(family):
    model, ids = tiny_model(family).eval(), tokens()
    cells = used_cells(model, ids)
    others, base = other_digests(model, cells), rows_of(model, cells)
    with torch.no_grad(), TrainableCells(model, cells):
        expected = model(input_ids=ids).logits
    with TrainableCells(model, cells) as training:
        plain = training.chosen_bytes
        training.protect(texts(), floor=FLOOR)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            training.drop_empty_gradients()
            optimizer.step()
            optimizer.zero_grad()
        assert training.chosen_bytes == plain and training.optimizer_bytes(optimizer) == 2 * plain
        assert training.protection_bytes > 0
        with torch.no_grad():
            inside = model(input_ids=ids).logits
        training.merge()
    assert other_digests(model, cells) == others
    assert any(not torch.equal(row, was) for row, was in zip(rows_of(model, cells), base, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, inside, atol=2e-5, rtol=1e-4)
    # the update lies where protected inputs are weak: S^-1 undoes what S did to U
    assert all(bool(torch.isfinite(row).all()) for row in rows_of(model, cells))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"], ids=["rows_are_outputs", "rows_are_inputs_and_biases"])
def test_the_change_on_protected_text_keeps_the_bound(family):
    """The mean squared change of one matrix's output, weighted by gates, is at most the floor times the mean energy times |U|^2."""
    model = tiny_model(family).eval()
    protected = texts(1)
    cells = used_cells(model, protected["a"][0], per_layer=1, layers=1)
    with TrainableCells(model, cells) as training:
        inputs = {}
        for tensor in training._tensors:
            tensor.see = lambda values, gates, tensor=tensor, **_: inputs.setdefault(tensor, []).append(values * gates[:, None])
        with torch.no_grad():
            model(input_ids=protected["a"][0])
        for tensor in training._tensors:
            del tensor.see
        training.protect(protected, floor=FLOOR)
        generator = torch.Generator().manual_seed(0)
        for tensor in training._tensors:
            with torch.no_grad():
                tensor.leaves[""].normal_(generator=generator)
                change, entering = tensor.value() - tensor.rows, torch.cat(inputs[tensor])
                if change.ndim == 1:
                    change = change[:, None]
                elif tensor._inputs_first:
                    change = change.T
                felt = float((entering @ change.T).pow(2).sum()) / protected["a"][0].numel()
                energy = float(entering.pow(2).sum()) / protected["a"][0].numel() / entering.shape[1]
                assert 0 < felt <= FLOOR * energy * float(tensor.leaves[""].pow(2).sum()) * (1 + 1e-4)


def test_protected_text_is_kept_and_the_target_is_learned_all_the_same():
    """One update of equal size, with and without: protection cuts what the protected text loses far more than what the target gains."""
    ids, kept = tokens(0, (8, 24)) % 40 + 3, tokens(1, (8, 24)) % 40 + 70
    base = tiny_model("olmoe", num_hidden_layers=2).train()
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(60):  # both texts are known, so that there is something to forget
        base(input_ids=torch.cat([ids[:4], kept]), labels=torch.cat([ids[:4], kept])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base.eval()
    cells = [(layer, expert) for layer in range(2) for expert in range(8)]
    change = {}
    for floor in (None, 0.003):
        with TrainableCells(base, cells) as training:
            if floor:
                training.protect({"kept": [kept]}, floor=floor)
            before = [float(base(input_ids=part, labels=part).loss.detach()) for part in (ids, kept)]
            optimizer = torch.optim.AdamW(training.parameters(), lr=3e-3, weight_decay=0.0)
            for _ in range(100):
                loss = base(input_ids=ids, labels=ids).loss
                if before[0] - float(loss.detach()) > 0.2:
                    break
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            after = [float(base(input_ids=part, labels=part).loss.detach()) for part in (ids, kept)]
        change[floor] = before[0] - after[0], after[1] - before[1]
    assert all(gained > 0.2 for gained, _ in change.values())
    assert change[0.003][1] < 0.5 * change[None][1]


def test_an_expert_that_no_protected_token_uses_is_trained_as_without():
    model, few = tiny_model("olmoe").eval(), tokens(10, (1, 2))  # two tokens, two experts each: four of eight have none
    used = used_cells(model, few, per_layer=1, layers=1)
    layer = used[0][0]
    with TrainableCells(model, [(layer, expert) for expert in range(8)]) as training:
        training.protect({"few": [few]}, floor=FLOOR)
        shaped = {tensor.cell.expert: tensor.shaping is not None for tensor in training._tensors}
        free = next(tensor for tensor in training._tensors if not shaped[tensor.cell.expert])
        assert torch.equal(free.leaves[""], free.rows)
    assert shaped[used[0][1]] and 2 <= sum(shaped.values()) <= 4


def test_what_cannot_be_protected_is_refused():
    model = tiny_model("olmoe")
    for named in ({"rank": 2}, {"method": "view_leaves"}):
        with TrainableCells(model, [(0, 0)], **named) as training, pytest.raises(FinetuneError, match="protection is not made for"):
            training.protect(texts(), floor=FLOOR)
    with TrainableCells(model, [(0, 0)]) as training:
        with pytest.raises(FinetuneError, match="at least one other domain"):
            training.protect({}, floor=FLOOR)
        with pytest.raises(FinetuneError, match="domain a: it has no tokens"):
            training.protect({"a": []}, floor=FLOOR)
        for floor in (0.0, -1.0, float("nan")):
            with pytest.raises(FinetuneError, match="above 0"):
                training.protect(texts(), floor=floor)
    for values in ({"lora_rank": 2}, {"method": "view_leaves"}, {"train_router": True}):
        with pytest.raises(FinetuneError, match="protect shapes whole experts"):
            settings(protect=0.03, **values)
    with pytest.raises(FinetuneError, match="give protect too"):
        settings(protect_domains=("law",))
    with pytest.raises(FinetuneError, match="--protect: "):
        settings(protect=0.0)


def test_a_protected_run_reports_its_matrices_and_an_interrupted_one_ends_like_it(run, monkeypatch, tmp_path):  # noqa: F811
    report, whole = run(protect=0.03, steps=6)
    assert report.protection_bytes > 0 and report.optimizer_bytes == 2 * report.chosen_bytes
    plain, folder = run(steps=6)
    assert plain.protection_bytes == 0 and not same_weights(whole, folder)
    step, calls = training_module.batch_places, []

    def stop(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(training_module, "batch_places", stop)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "cut", protect=0.03, steps=6, named={"checkpoint_seconds": 0.0})
    monkeypatch.setattr(training_module, "batch_places", step)
    run(out=tmp_path / "cut", protect=0.03, steps=6)
    assert same_weights(tmp_path / "cut", whole)
    with pytest.raises(FinetuneError, match="protect_domains sea: other domains of the task are"):
        run(protect=0.03, protect_domains=("sea",))
    one, _ = run(protect=0.03, steps=6, protect_domains=("code",))
    assert one.protection_bytes == report.protection_bytes and one.after != report.after


def test_rows_are_full_and_nothing_is_padded(tiny_checkpoint):
    from transformers import AutoTokenizer

    from dbes.tasks.entries import Entry

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    entries = [Entry(id=str(number), source=str(number), segments=(("some words " * 20, True),)) for number in range(9)]
    batches = full_rows(entries, tokenizer, length=16, tokens=200, rows=4)
    assert all(batch.shape[1] == 16 for batch in batches) and [len(batch) for batch in batches] == [4, 4, 4]
    assert full_rows([], tokenizer, length=16, tokens=200) == []
    (short,) = full_rows(entries[:1], tokenizer, length=10_000, tokens=200)
    assert short.shape[0] == 1 and 0 < short.shape[1] < 10_000
    assert digest(batches[0]) == digest(full_rows(entries, tokenizer, length=16, tokens=200, rows=4)[0])
    assert int(max(batch.max() for batch in batches)) < max(VOCABULARY, len(tokenizer))
