"""What a model does on documents it was not trained on: loss by domain in bits per byte, and its routing as a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbes.testbed.mix import Mix, overlap_domains
from dbes.testbed.models import routers_of
from dbes.testbed.routers import Routing
from dbes.testbed.settings import MixSettings, RoutingSettings
from dbes.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Held-out documents through a model.

    Attributes:
        trace: the experts every token used; one trace document per held-out document.
        nats: float [domains], summed over predicted tokens (all but the first of a document).
        tokens: int [domains], predicted tokens.
        bytes: int [domains], bytes these tokens stand for.
        entropy: float32 [rows of the trace], nats of the model's prediction of the **next** token after each token.
    """

    trace: Trace
    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    entropy: np.ndarray

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
    batch_tokens: int = 8192,
) -> Heldout:
    """Feed the beginning (at most ``length`` tokens) of at most ``documents`` held-out documents per domain, each by itself.

    Routers decide as a plain checkpoint would: nothing is balanced or dropped. The prescribed ones go on prescribing.
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
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("ids", "weights", "margins", "document", "positions", "token_ids", "entropy")
    }
    nats, tokens, octets = np.zeros(len(mix.domains)), np.zeros(len(mix.domains), np.int64), np.zeros(len(mix.domains), np.int64)
    order = sorted(range(len(chosen)), key=lambda document: len(chosen[document][2]))
    with Routing(model, routing, domains=len(mix.domains), seed=seed, training=False) as session:
        if bias is not None:
            session.bias.copy_(bias)
        while order:
            width = len(chosen[order[-1]][2])
            members = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // width)))]
            padded = np.ones((len(members), width), np.int64)
            for row, document in enumerate(members):
                padded[row, : len(chosen[document][2])] = chosen[document][2]
            lengths = np.asarray([len(chosen[document][2]) for document in members])
            domain = np.asarray([chosen[document][0] for document in members])
            session.begin(torch.from_numpy(padded), torch.from_numpy(domain), step=step)
            logits = model(input_ids=torch.from_numpy(padded), use_cache=False).logits.float()
            logarithms = logits.log_softmax(-1)
            entropy = -(logarithms.exp() * logarithms).sum(-1).numpy()
            losses = -logarithms[:, :-1].gather(2, torch.from_numpy(padded)[:, 1:, None])[..., 0].numpy()
            real = np.arange(width) < lengths[:, None]
            predicted = real[:, 1:]
            np.add.at(nats, domain, np.where(predicted, losses, 0).sum(1))
            np.add.at(tokens, domain, predicted.sum(1))
            np.add.at(octets, domain, np.where(predicted, mix.token_bytes[padded[:, 1:]], 0).sum(1))
            flat = real.reshape(-1)
            columns["ids"].append(torch.stack([made.ids for made in session.decisions], 1).numpy()[flat])
            columns["weights"].append(torch.stack([made.weights for made in session.decisions], 1).float().numpy()[flat])
            margins = [made.margins for made in session.decisions if made.margins is not None]
            columns["margins"].append(torch.stack(margins, 1).numpy()[flat])
            columns["document"].append(np.repeat(np.asarray(members), width)[flat])
            columns["positions"].append(np.tile(np.arange(width), len(members))[flat])
            columns["token_ids"].append(padded.reshape(-1)[flat])
            columns["entropy"].append(entropy.reshape(-1)[flat])
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    in_order = np.lexsort((joined["positions"], joined["document"]))
    trace = Trace.from_arrays(
        joined["ids"],
        document=joined["document"],
        domain=[domain for domain, _, _ in chosen],
        domains=mix.domains,
        layers=range(len(routers_of(model))),
        experts=int(routers_of(model)[0].num_experts),  # pyright: ignore[reportArgumentType]
        weights=joined["weights"],
        margins=joined["margins"],
        token_ids=joined["token_ids"],
        positions=joined["positions"],
        document_ids=[f"{mix.domains[domain]}/{place}" for domain, place, _ in chosen],
    )
    return Heldout(trace=trace, nats=nats, tokens=tokens, bytes=octets, entropy=joined["entropy"][in_order].astype(np.float32))
