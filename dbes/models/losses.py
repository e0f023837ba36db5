"""Nats per token: what every loss that is measured or trained by is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dbes.models.execution import logits_of
from dbes.models.windows import padded


def in_batches(lengths: Sequence[int], most: int, *, order: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Places of runs of tokens in batches of at most ``most`` tokens with padding, a longer run by itself.

    Args:
        order: of the places, by rising or by falling length; the longest first by default.
    """
    members: list[int] = []
    for place in order if order is not None else sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if members and max(lengths[members[0]], lengths[place]) * (len(members) + 1) > most:
            yield members
            members = []
        members.append(place)
    if members:
        yield members


def token_nats(
    model: nn.Module, inputs: Mapping[str, Tensor], counted: Tensor | None = None, *, reduction: Literal["none", "mean"] = "none"
) -> Tensor:
    """Nats of every counted token in order, float32 [tokens], or their mean; differentiable.

    Args:
        inputs: of the model, ``input_ids`` int64 [sequences, length] among them.
        counted: bool [sequences, length]; all tokens without it. The first of a sequence is never predicted.
    """
    logits, labels = logits_of(model, **inputs)[:, :-1], inputs["input_ids"][:, 1:]
    labels = labels.to(logits.device)
    # only rows that count are widened to float32: at large vocabularies the logits are the largest tensor of all
    wanted = ... if counted is None else counted[:, 1:].to(logits.device)
    rows, labels = logits[wanted].reshape(-1, logits.shape[-1]), labels[wanted].reshape(-1)
    return nn.functional.cross_entropy(rows.float(), labels, reduction=reduction)


def padded_nats(model: nn.Module, runs: Sequence[np.ndarray], *, masked: bool) -> tuple[Tensor, Tensor]:
    """Nats of every token but the first of runs padded on the right, float32 [runs, longest - 1]; and bool, where there is a token.

    Differentiable.

    Args:
        masked: tell the model of the padding. Causal attention never looks there, so this changes no more than rounding.
    """
    ids, mask = (torch.from_numpy(part) for part in padded(runs, padding=0))
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if masked and not mask.all() else {})
    logits = logits_of(model, **inputs)[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none")
    return losses, mask[:, 1:].bool().to(losses.device)


def predictions(model: nn.Module, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every next token, [sequences, length - 1], and the entropy of every prediction, [sequences, length]."""
    logarithms = logits_of(model, input_ids=tokens).float().log_softmax(-1)
    entropy = -(logarithms.exp() * logarithms).sum(-1)
    losses = -logarithms[:, :-1].gather(2, tokens[:, 1:, None].to(logarithms.device))[..., 0]
    return losses.cpu().numpy(), entropy.cpu().numpy()


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean next-token loss of a linear head without ever holding the logits of more than ``chunk`` tokens.

    The gradients are computed on the way forward, which the mean allows: the same numbers as the plain way, a fraction of
    the memory traffic, which is what a CPU spends most of its time on at the testbed's sizes.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_gradient, head_gradient = torch.empty_like(hidden), torch.zeros_like(head)
        nats = torch.empty(len(hidden), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            logits = rows @ head.T
            normaliser = logits.logsumexp(-1, keepdim=True)
            nats[start : start + chunk] = (normaliser - logits.gather(1, target))[:, 0]
            error = logits.sub_(normaliser).exp_()
            error.scatter_add_(1, target, torch.full_like(target, -1, dtype=error.dtype)).div_(len(hidden))
            hidden_gradient[start : start + chunk] = error @ head
            head_gradient.addmm_(error.T, rows)
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.mark_non_differentiable(nats)
        return nats.mean(), nats

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, head_gradient * gradient, None, None


def next_token_loss(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean nats per predicted token, and the nats of each, [sequences, length - 1] (without gradient), of a plain linear head."""
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    head = cast(nn.Linear, model.get_output_embeddings()).weight
    loss, nats = _MeanCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), head, tokens[:, 1:].reshape(-1), 1024)  # pyright: ignore[reportGeneralTypeIssues]
    return loss, nats.view(len(tokens), -1)
