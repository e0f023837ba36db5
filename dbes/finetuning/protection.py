r"""Updates that other domains hardly feel: trained values are :math:`W = W_0 + U S`, where only :math:`U` is trained.

The experts of a path also serve tokens of other domains. Let :math:`x_t` be what enters a matrix of a chosen expert at token t of
a protected domain, and :math:`g_t` the expert's gate weight there (0 where the token is not routed to it). With

.. math:: C = \operatorname{mean}_d \frac{1}{T_d} \sum_{t \in d} g_t^2 x_t x_t^\top \qquad S = (C / \lambda + I)^{-1/2}

an update U adds :math:`\operatorname{tr}(U S C S U^\top) \le \lambda \|U\|^2` to the mean squared change of the expert's output on
protected text: directions that other domains use shrink, directions that they do not use are trained as without protection.
It is a soft form of training in the null space of old inputs (OWM, arXiv 1810.01256; Adam-NSCL, arXiv 2103.07113). Here C counts
gate weights, so that an expert that other domains rarely use is hardly held back.

:math:`\lambda` is the ``floor`` times the mean diagonal of C over the chosen experts' tensors of the same name, so that it has no unit.
A bias has one constant input, and a number in place of S.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dbes.errors import FinetuneError
from dbes.finetuning.tensors import ExpertTensor
from dbes.models.execution import forward, mode

Share = Callable[[Tensor], Tensor]


@torch.no_grad()
def shape_updates(
    model: nn.Module, tensors: Sequence[ExpertTensor], texts: Mapping[str, Sequence[Tensor]], *, floor: float, share: Share | None = None
) -> None:
    """Give every tensor its S, measured on the protected domains' texts; from here on its leaf is U, zero.

    The model must compute with these tensors (the split bank is installed).

    Args:
        texts: token ids by domain, int64 [sequences, length] each; without padding, which would be routed and counted too.
        share: gives every process the first one's matrix, where several train: their leaves must mean the same to the last bit.

    Raises:
        FinetuneError: no domain or a domain without a token; a floor that is not above 0.
    """
    if not floor > 0:
        raise FinetuneError(f"--protect {floor}: expected a number above 0; smaller protects more")
    if not texts:
        raise FinetuneError("protection needs texts of at least one other domain")
    for tensor in tensors:
        tensor.measure_inputs()
    try:
        with mode(model, training=False):
            for name, batches in texts.items():
                for batch in batches:
                    forward(model, input_ids=batch)
                tokens = sum(batch.numel() for batch in batches)
                if not tokens:
                    raise FinetuneError(f"protected domain {name}: it has no tokens")
                for tensor in tensors:
                    tensor.end_domain(tokens * len(texts))
    finally:
        moments = [tensor.take_moment() for tensor in tensors]
    for kind in dict.fromkeys(tensor.kind for tensor in tensors):
        mine = [(tensor, moment) for tensor, moment in zip(tensors, moments, strict=True) if tensor.kind == kind]
        # a tensor that no protected token enters is trained as without protection, and counts as 0 here
        scale = floor * sum(float(moment.diagonal().mean()) for _, moment in mine if moment is not None) / len(mine)
        for tensor, moment in mine:
            if moment is not None and scale > 0:
                shaping = inverse_root(moment, scale)
                tensor.shape_update(share(shaping) if share is not None else shaping)


def inverse_root(moment: Tensor, scale: float) -> Tensor:
    r""":math:`(C / \lambda + I)^{-1/2}` of a symmetric matrix C that is not negative, [inputs, inputs], for :math:`\lambda > 0`."""
    values, vectors = torch.linalg.eigh(moment.double())
    return ((vectors * (values.clamp(min=0) / scale + 1).rsqrt()) @ vectors.T).to(moment.dtype)
