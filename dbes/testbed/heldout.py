"""What a model does on documents it was not trained on: loss by domain in bits per byte, and its routing as a trace."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbes.models.execution import forward, input_device
from dbes.models.losses import in_batches, predictions
from dbes.models.windows import padded
from dbes.recording.stiffness import Noise, logit_stiffness, noise_keys, noise_rows, selection_stiffness
from dbes.testbed.mix import Batches, Mix, overlap_domains
from dbes.testbed.models import routers_of
from dbes.testbed.routers import LayerRoutes, Routing
from dbes.testbed.settings import MixSettings, RoutingSettings, TrainSettings
from dbes.trace.store import Trace
from dbes.trace.types import NOISE_SCALES, UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Held-out documents through a model. Rows are tokens in the order of the trace: by document, then position.

    Attributes:
        trace: the experts every token used; one trace document per held-out document.
        nats: float [domains], summed over predicted tokens (all but the first of a document).
        tokens: int [domains], predicted tokens.
        bytes: int [domains], bytes these tokens stand for.
        entropy: float32 [rows], nats of the model's prediction of the token **after** each row's.
        inputs: float16 [rows, layers, hidden], what the routers saw; None unless asked for.
    """

    trace: Trace
    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    entropy: np.ndarray
    inputs: np.ndarray | None = None

    @property
    def bits_per_byte(self) -> np.ndarray:
        """Float [domains]: comparable between domains and tokenizers, which nats per token are not."""
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> np.ndarray:
        return self.nats / self.tokens


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    mix: Mix,
    *,
    routing: RoutingSettings,
    bias: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    length: int = 128,
    documents: int = 64,
    overlap: MixSettings | None = None,
    keep_inputs: bool = False,
    batch_tokens: int = 8192,
) -> Heldout:
    """Feed the beginning (at most ``length`` tokens) of at most ``documents`` held-out documents per domain, each by itself.

    Routers decide as a plain checkpoint would: nothing is balanced or dropped. Prescribed routers prescribe here too.
    """
    generator = np.random.default_rng([seed, 3])
    chosen: list[tuple[int, int, np.ndarray]] = []
    for index, domain in enumerate(mix.heldout):
        for place in range(min(documents, len(domain))):
            row = domain.document(place)[:length]
            if overlap is not None and overlap.overlap:
                row = overlap_domains(row, mix.heldout, index, overlap, generator)
            if len(row) > 1:
                chosen.append((index, place, row))
    names = tuple(f"{mix.domains[domain]}/{place}" for domain, place, _ in chosen)
    layers = tuple(range(len(routers_of(model))))
    experts, slots = int(routers_of(model)[0].num_experts), int(routers_of(model)[0].top_k)
    device = input_device(model)
    noise = Noise.drawn(classes=experts, slots=slots, seed=seed).to(device)
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    totals = np.zeros((3, len(mix.domains)))
    lengths = [len(row) for _, _, row in chosen]
    order = sorted(range(len(chosen)), key=lambda document: (-lengths[document], -document))
    with Routing(model, routing, domains=len(mix.domains), seed=seed, training=False) as session:
        if bias is not None:
            session.bias.copy_(bias)
        for members in in_batches(lengths, batch_tokens, order=order):
            tokens, mask = padded([chosen[document][2] for document in members], padding=1)
            real, width = mask.astype(bool), tokens.shape[1]
            domain = np.asarray([chosen[document][0] for document in members])
            session.begin(torch.from_numpy(tokens).to(device), torch.from_numpy(domain).to(device), step=step)
            losses, entropy = predictions(model, torch.from_numpy(tokens))
            predicted = real[:, 1:]
            for total, values in zip(totals, (losses, predicted, mix.token_bytes[tokens[:, 1:]]), strict=True):
                np.add.at(total, domain, np.where(predicted, values, 0).sum(1))
            flat = np.flatnonzero(real)
            columns["document"].append(np.repeat(members, width)[flat])
            columns["positions"].append(np.tile(np.arange(width), len(members))[flat])
            columns["token_ids"].append(tokens.reshape(-1)[flat])
            columns["entropy"].append(entropy.reshape(-1)[flat])
            keys = np.concatenate([noise_keys(names[document], np.arange(lengths[document])) for document in members])
            rows = np.stack([noise_rows(keys, layer) for layer in layers])
            for name, values in _routes(session.decisions, torch.from_numpy(flat).to(device), noise, rows).items():
                columns[name].append(values)
            if keep_inputs:
                seen = torch.stack([made.inputs for made in session.decisions], 1)
                columns["inputs"].append(seen[torch.from_numpy(flat).to(device)].to(torch.float16).cpu().numpy())
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    in_order = np.lexsort((joined["positions"], joined["document"]))
    entropy = joined.pop("entropy")[in_order].astype(np.float32)
    inputs = joined.pop("inputs")[in_order] if keep_inputs else None
    ids = joined.pop("ids")
    columns_left: dict[str, Any] = dict(joined)
    trace = Trace.from_arrays(
        ids,
        domain=[domain for domain, _, _ in chosen],
        domains=mix.domains,
        layers=layers,
        experts=experts,
        document_ids=names,
        **columns_left,
    )
    nats, count, text_bytes = totals
    return Heldout(trace=trace, nats=nats, tokens=count.astype(np.int64), bytes=text_bytes.astype(np.int64), entropy=entropy, inputs=inputs)


@torch.no_grad()
def training_routes(model: PreTrainedModel, mix: Mix, settings: TrainSettings, *, bias: Tensor, batches: int = 12) -> Trace:
    """Held-out tokens in batches as in training, routed as in training: balanced over the scope, dropped beyond capacity.

    What ``measure`` says of a plain checkpoint leaves out an assignment that only training makes; the difference between the two
    is what the router has learned to do by itself. Every sequence is a document of the trace; dropped slots are missing.
    """
    drawn = Batches(replace(mix, training=mix.heldout), settings.mix, steps=batches, seed=settings.data_seed)
    kept = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("e_score_correction_bias")}
    ids, tokens, document, domain, device = [], [], [], [], input_device(model)
    with Routing(model, settings.routing, domains=len(mix.domains), seed=settings.seed) as session:
        session.bias.copy_(bias)
        for step in range(batches):
            batch = drawn(step)
            # The step of the re-randomised router's last draw: a new one would not be what training ended with.
            tokens_here, domain_here = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.domain).to(device)
            session.begin(tokens_here, domain_here, step=settings.optimizer.steps)
            forward(model, input_ids=tokens_here)
            made = [torch.where(layer.weights > 0, layer.ids, -1) for layer in session.decisions]
            ids.append(torch.stack(made, 1).cpu().numpy())
            tokens.append(batch.tokens.reshape(-1))
            document.append(len(domain) + np.repeat(np.arange(len(batch.domain)), batch.tokens.shape[1]))
            domain.extend(batch.domain.tolist())
    model.load_state_dict(kept, strict=False)
    return Trace.from_arrays(
        np.concatenate(ids),
        document=np.concatenate(document),
        token_ids=np.concatenate(tokens),
        domain=domain,
        domains=mix.domains,
        layers=tuple(range(len(routers_of(model)))),
        experts=int(routers_of(model)[0].num_experts),
    )


def _routes(decisions: list[LayerRoutes], rows: Tensor, noise: Noise, noise_at: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of a trace for some tokens of a batch: [rows, layers, ...]."""
    by_layer: dict[str, list[Tensor]] = defaultdict(list)
    for layer, made in enumerate(decisions):
        ids = made.ids[rows]
        drawn = torch.from_numpy(noise_at[layer]).to(ids.device)
        by_layer["ids"].append(ids)
        by_layer["weights"].append(made.weights[rows].float())
        if made.selection is None:
            nothing = torch.full((len(ids),), torch.nan, device=ids.device)
            kept = torch.full((len(ids), len(NOISE_SCALES)), UNKNOWN, dtype=torch.uint8, device=ids.device)
            margin = scaled = logit_margin = nothing
        else:
            margin, scaled, kept = selection_stiffness(made.selection[rows], ids, noise.normal[drawn], None)
            logit_margin, _ = logit_stiffness(made.logits[rows], ids, noise.uniform[drawn])
        by_layer["margins"].append(logit_margin)
        by_layer["selection_margins"].append(margin)
        by_layer["scaled_margins"].append(scaled)
        by_layer["kept"].append(kept)
    return {name: torch.stack(parts, 1).cpu().numpy() for name, parts in by_layer.items()}
