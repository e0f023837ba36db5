"""Two recordings of the same documents side by side: which documents both hold, and the routes of the same tokens in both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from dbes.errors import TraceError
from dbes.text import clipped
from dbes.trace.store import Trace
from dbes.trace.types import GENERATED, RoutingShape, TokenRoutes


@dataclass(frozen=True, kw_only=True)
class Common:
    """The documents that two recordings have in common.

    Attributes:
        second_of: int [documents of the first], index of the same document in the second; -1: the second does not have it.
        only_first, only_second: documents that one of them alone has.
        same_order: the documents in common stand in one order in both.
    """

    second_of: np.ndarray
    only_first: int
    only_second: int

    @property
    def documents(self) -> int:
        return int((self.second_of >= 0).sum())

    @property
    def same_order(self) -> bool:
        return bool(np.all(np.diff(self.second_of[self.second_of >= 0]) > 0))


def common_documents(first: Trace, second: Trace) -> Common:
    """The documents of equal id, of recordings whose routers have the same sizes.

    Raises:
        TraceError: other layers, experts or top-k; a document with another domain or source; none in common; documents that have only
            numbers, where neither token ids nor the fingerprint of a task show that they are the same.
    """
    a, b = first.shape, second.shape
    for name, called in (("layers", "MoE layers"), ("experts", "experts"), ("top_k", "top-k")):
        if (here := getattr(a, name)) != (there := getattr(b, name)):
            raise TraceError(f"{_first_unlike(called, here, there, a)}; only recordings of routers of one size can agree or differ")
    place = {document: index for index, document in enumerate(b.document_ids)}
    second_of = np.asarray([place.get(document, -1) for document in a.document_ids], np.int64)
    found = Common(
        second_of=second_of, only_first=int((second_of < 0).sum()), only_second=len(b.document_ids) - int((second_of >= 0).sum())
    )
    if not found.documents:
        raise TraceError(
            f"no document is in both recordings: the first has {clipped(a.document_ids[0])!r}, ..., the second "
            f"{clipped(b.document_ids[0])!r}, ...; record the same task, or give both the same document ids"
        )
    for one, other in zip(np.flatnonzero(second_of >= 0).tolist(), second_of[second_of >= 0].tolist(), strict=True):
        for kind, here, there in (("domain", _domain(a, one), _domain(b, other)), ("source", _source(a, one), _source(b, other))):
            if here is not None and there is not None and here != there:
                raise TraceError(
                    f"document {clipped(a.document_ids[one])!r} has {kind} {clipped(here)!r} in the first recording and {clipped(there)!r} "
                    "in the second; documents of equal id must be the same text"
                )
    return found


def _first_unlike(called: str, here: tuple[int, ...], there: tuple[int, ...], shape: RoutingShape) -> str:
    """Where two recordings of other sizes first differ."""
    if called == "MoE layers" or len(here) != len(there):
        return f"the first recording has {called} {clipped(list(here))}, the second {clipped(list(there))}"
    column = next(column for column, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1])
    return f"layer {shape.layers[column]}: {called} {here[column]} in the first recording and {there[column]} in the second"


def _domain(shape: RoutingShape, document: int) -> str:
    return shape.domains[int(shape.document_domain[document])]


def _source(shape: RoutingShape, document: int) -> str | None:
    return None if shape.document_source is None else shape.document_source[document]


@dataclass
class Left:
    """Tokens that were looked at, filled in while ``same_tokens`` is read.

    Attributes:
        first, second: tokens of common documents that one recording alone has.
        verified: tokens whose ids are known in both, and equal.
        unverified: tokens in both whose ids one of them does not know.
    """

    first: int = 0
    second: int = 0
    verified: int = 0
    unverified: int = 0


def same_tokens(
    first: Trace, second: Trace, common: Common, *, columns: tuple[str, ...] = (), left: Left
) -> Iterator[tuple[TokenRoutes, TokenRoutes]]:
    """Routes of the same tokens in both, a shard of the first at a time; documents have the numbers of the first.

    Tokens are matched by document and position. Shards may be cut elsewhere, and documents stand in another order, in the second.

    Args:
        columns: of the first, besides ids, document, positions, token ids and phase.
        left: counts what could not be matched.

    Raises:
        TraceError: a token has another id in one than in the other.
    """
    count = len(second.shape.document_ids)
    back = np.full(count, -1, np.int64)
    back[common.second_of[common.second_of >= 0]] = np.flatnonzero(common.second_of >= 0)
    for routes in first.with_columns("token_ids", "phase", *columns):
        present = common.second_of[routes.document] >= 0
        one = _only(routes if present.all() else routes.take(present), ("token_ids", "phase", *columns))
        wanted = np.zeros(count, bool)
        wanted[common.second_of[np.unique(one.document)]] = True
        parts = [_only(part, ("token_ids",)) for part in second.documents(wanted, "token_ids")] if len(one) else []
        parts = [replace(part, document=back[part.document].astype(np.int32)) for part in parts if len(part)]
        if not parts:
            left.first += len(one)
            continue
        other = parts[0] if len(parts) == 1 else _joined(parts)
        yield _matched(one, other, first.shape, left)


def _only(routes: TokenRoutes, names: tuple[str, ...]) -> TokenRoutes:
    """The routes without the columns that are not asked for, whose memory is free then."""
    kept = {"ids", "document", "positions", *names}
    return replace(routes, **{field.name: None for field in fields(TokenRoutes) if field.name not in kept})


def _joined(parts: list[TokenRoutes]) -> TokenRoutes:
    names = set.intersection(*(set(part.arrays()) for part in parts))
    return TokenRoutes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _matched(one: TokenRoutes, other: TokenRoutes, shape: RoutingShape, left: Left) -> tuple[TokenRoutes, TokenRoutes]:
    """The rows of both that are of the same document and position, in the order of the first."""
    keys, others = _keys(one, shape), _keys(other, shape)
    if len(keys) != len(others) or not np.array_equal(keys, others):
        shared, rows, other_rows = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
        left.first += len(keys) - len(shared)
        left.second += len(others) - len(shared)
        one, other = one.take(rows), other.take(other_rows)
    if one.token_ids is None or other.token_ids is None:
        left.unverified += len(one)
    else:
        unlike = np.flatnonzero(one.token_ids != other.token_ids)
        if len(unlike):
            row = int(unlike[0])
            generated = one.phase is not None and one.phase[row] == GENERATED
            hint = "the model wrote this text, and otherwise in each: record the given text only" if generated else "record the same texts"
            raise TraceError(
                f"document {clipped(shape.document_ids[int(one.document[row])])!r}, position {int(one.positions[row])}: token "
                f"{int(one.token_ids[row])} in the first recording and {int(other.token_ids[row])} in the second; agreement is of the "
                f"same tokens, {hint} with one tokenizer"
            )
        left.verified += len(one)
    return one, other


def _keys(routes: TokenRoutes, shape: RoutingShape) -> np.ndarray:
    """One number per token, from its document and position.

    Raises:
        TraceError: a position stands twice in a document.
    """
    keys = (routes.document.astype(np.int64) << 32) | routes.positions.astype(np.int64)
    ordered = keys if np.all(np.diff(keys) > 0) else np.sort(keys)
    twice = np.flatnonzero(np.diff(ordered) == 0)
    if len(twice):
        document, position = divmod(int(ordered[twice[0]]), 1 << 32)
        raise TraceError(
            f"document {clipped(shape.document_ids[document])!r} has position {position} twice: tokens cannot be matched by their place"
        )
    return keys
