"""Every metric again, slowly: plain loops over tokens, written from the definitions alone, to compare the package with.

Nothing here imports dbes except ``Recording.trace``, which hands the same raw arrays over to it. Counts are nested lists,
sums are ``math.fsum``; the only numerical routine borrowed is ``numpy.linalg.svd``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from dbes.trace.store import Trace

NAN = float("nan")
Vector = list[float]
Matrix = list[Vector]
GROUP_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Raw arrays of a recording, exactly what a user hands to ``Trace.from_arrays``."""

    ids: np.ndarray
    document: np.ndarray
    domain: np.ndarray
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    weights: np.ndarray | None = None
    margins: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    selection_margins: np.ndarray | None = None
    scaled_margins: np.ndarray | None = None
    kept: np.ndarray | None = None
    positions: np.ndarray | None = None
    phase: np.ndarray | None = None

    def trace(self, **more: Any) -> Trace:
        return Trace.from_arrays(
            self.ids,
            document=self.document,
            domain=self.domain,
            domains=self.domains,
            layers=self.layers,
            experts=self.experts,
            weights=self.weights,
            margins=self.margins,
            token_ids=self.token_ids,
            selection_margins=self.selection_margins,
            scaled_margins=self.scaled_margins,
            kept=self.kept,
            positions=self.positions,
            phase=self.phase,
            **more,
        )

    def take(self, rows: np.ndarray) -> Recording:
        """The same recording with chosen token rows, in the order given."""
        names = ("ids", "document", "weights", "margins", "token_ids", "selection_margins", "scaled_margins", "kept", "positions", "phase")
        return replace(self, **{name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in names})

    def slots(self, layer: int) -> int:
        return min(self.ids.shape[2], self.experts[layer])


def random_recording(
    seed: int,
    *,
    documents: Sequence[int] = (3, 4, 2),
    length: tuple[int, int] = (5, 30),
    layers: int = 3,
    experts: int | tuple[int, ...] = 8,
    top_k: int = 2,
    missing: float = 0.0,
    skew: float = 1.0,
    effect: float = 0.7,
    vocabulary: int = 12,
    extras: bool = True,
) -> Recording:
    """Correlated documents whose routing leans to their domain: ``documents`` per domain, ragged lengths, all optional arrays."""
    random = np.random.default_rng(seed)
    widths = (experts,) * layers if isinstance(experts, int) else experts
    base = [random.normal(0, skew, width) for width in widths]
    lean = [[random.normal(0, effect, width) for width in widths] for _ in documents]
    domain = np.repeat(np.arange(len(documents)), documents)
    ids, document, weights = [], [], []
    slots = min(top_k, max(widths))
    for number, label in enumerate(domain):
        own = [random.normal(0, 0.5, width) for width in widths]
        for _ in range(int(random.integers(*length))):
            rows, gates = [], []
            for layer, width in enumerate(widths):
                score = base[layer] + lean[label][layer] + own[layer] + random.gumbel(size=width)
                chosen = list(random.permutation(np.argsort(-score)[: min(slots, width)]))
                gate = list(random.dirichlet(np.ones(len(chosen))))
                chosen += [-1] * (slots - len(chosen))
                gate += [0.0] * (slots - len(gate))
                for slot in range(slots):
                    if slots > 1 and random.random() < missing:
                        chosen[slot], gate[slot] = -1, 0.0
                rows.append(chosen)
                gates.append(gate)
            ids.append(rows)
            weights.append(gates)
            document.append(number)
    tokens = len(document)
    shape = (tokens, len(widths))
    scaled = random.gamma(1.0, 0.3, shape)
    return Recording(
        ids=np.array(ids, np.int64).reshape(tokens, len(widths), slots),
        document=np.array(document),
        domain=domain,
        domains=tuple(f"domain{i}" for i in range(len(documents))),
        layers=tuple(range(1, 2 * len(widths), 2)),
        experts=tuple(widths),
        weights=np.array(weights).astype(np.float16) if extras else None,  # as a trace keeps them
        margins=random.normal(0.5, 1, shape).astype(np.float32) if extras else None,
        token_ids=random.integers(0, vocabulary, tokens) if extras else None,
        selection_margins=(scaled * 0.1).astype(np.float32) if extras else None,
        scaled_margins=scaled.astype(np.float32) if extras else None,
        kept=random.integers(0, slots + 1, (*shape, 4)).astype(np.uint8) if extras else None,
    )


# ---------------------------------------------------------------------------------------------------------------- counts


def hits(recording: Recording) -> list[list[Vector]]:
    """[documents][layers][experts], slots of tokens of the document that chose the expert."""
    counts = [[[0.0] * width for width in recording.experts] for _ in recording.domain]
    for token, document in enumerate(recording.document):
        for layer in range(len(recording.layers)):
            for expert in recording.ids[token, layer]:
                if expert >= 0:
                    counts[document][layer][expert] += 1
    return counts


def of_domain(recording: Recording, counts: list[list[Vector]]) -> list[list[Vector]]:
    """[domains][layers][experts], sums over the documents of each domain."""
    sums = [[[0.0] * width for width in recording.experts] for _ in recording.domains]
    for document, domain in enumerate(recording.domain):
        for layer, row in enumerate(counts[document]):
            for expert, count in enumerate(row):
                sums[domain][layer][expert] += count
    return sums


def tokens_of(recording: Recording) -> list[int]:
    """[domains], tokens."""
    found = Counter(int(recording.domain[document]) for document in recording.document)
    return [found[domain] for domain in range(len(recording.domains))]


def share(row: Sequence[float]) -> Vector:
    total = math.fsum(row)
    return [value / total if total else NAN for value in row]


def profile(recording: Recording) -> list[list[Vector]]:
    """p[d][l][e]; NaN for a domain without a token."""
    return [[share(row) for row in rows] for rows in of_domain(recording, hits(recording))]


def seen(recording: Recording) -> list[int]:
    return [domain for domain, tokens in enumerate(tokens_of(recording)) if tokens]


def known_mean(values: Sequence[float]) -> float:
    """Mean of the values that are numbers; NaN when none is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else NAN


def mean(values: Sequence[float]) -> float:
    """Unweighted mean; NaN as soon as one value is."""
    return math.fsum(values) / len(values)


def undefined(matrix: Sequence[Sequence[float]]) -> bool:
    return any(math.isnan(value) for row in matrix for value in row)


# ------------------------------------------------------------------------------------------------------------- published


def rs_row(row: Sequence[float]) -> float:
    raised = [value + 1e-10 for value in row]
    q = [value / math.fsum(raised) for value in raised]
    return math.fsum(value * math.log(value * len(q)) for value in q)


def rs(p: list[list[Vector]]) -> list[Vector]:
    """[domains][layers]."""
    return [[rs_row(row) for row in rows] for rows in p]


def singular(matrix: Sequence[Sequence[float]]) -> Vector:
    if undefined(matrix):
        return [NAN]
    return [float(value) for value in np.linalg.svd(np.array(matrix, float), compute_uv=False)]


def ner(rows: Sequence[Sequence[float]]) -> float:
    s = singular(rows)
    rank = math.fsum(s) ** 2 / math.fsum(v * v for v in s) / min(len(rows), len(rows[0]))
    return rank if math.isnan(rank) else min(1.0, rank)


def exp_entropy(matrix: Sequence[Sequence[float]]) -> float:
    s = singular(matrix)
    p = [value / math.fsum(s) for value in s]
    return math.exp(-math.fsum(value * math.log(value) for value in p if not value <= 0))


def ner_entropy(rows: Sequence[Sequence[float]]) -> float:
    return exp_entropy(rows) / min(len(rows), len(rows[0]))


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def di(vectors: list[Vector]) -> Vector:
    """[domains], one minus the mean cosine with the other domains; 0 where there is no other."""
    values = []
    for own in range(len(vectors)):
        others = [cosine(vectors[own], vectors[other]) for other in range(len(vectors)) if other != own]
        values.append(1 - math.fsum(others) / len(others) if others else 0.0)
    return values


def flat(rows: Sequence[Sequence[float]]) -> Vector:
    return [value for row in rows for value in row]


def token_mean(recording: Recording, values: np.ndarray) -> list[Vector]:
    """[domains][layers], mean of a token's value, tokens with NaN left out."""
    result = []
    for domain in range(len(recording.domains)):
        rows = [token for token, document in enumerate(recording.document) if recording.domain[document] == domain]
        result.append([known_mean([float(values[token, layer]) for token in rows]) for layer in range(len(recording.layers))])
    return result


def primary(recording: Recording, token: int, layer: int) -> int:
    """The executed slot with the largest weight (of equals the lowest expert: slot order means nothing); -1 when nothing ran."""
    weights = np.ones(recording.ids.shape[2]) if recording.weights is None else recording.weights[token, layer]
    ran = [(-float(weight), int(expert)) for expert, weight in zip(recording.ids[token, layer], weights, strict=True) if expert >= 0]
    return min(ran)[1] if ran else -1


def texts(recording: Recording) -> list[list[int]]:
    """[documents], token rows in order."""
    rows: list[list[int]] = [[] for _ in recording.domain]
    for token, document in enumerate(recording.document):
        rows[document].append(token)
    return rows


def windows(recording: Recording, domain: int, n: int) -> list[list[int]]:
    """Every n consecutive token rows of one document of the domain."""
    found = []
    for document, rows in enumerate(texts(recording)):
        if recording.domain[document] == domain:
            found += [rows[start : start + n] for start in range(len(rows) - n + 1)]
    return found


def ngram_ratio(recording: Recording, n: int) -> list[Vector]:
    """[domains][layers]."""
    result = []
    for domain in range(len(recording.domains)):
        row = []
        for layer in range(len(recording.layers)):
            found = [[primary(recording, token, layer) for token in window] for window in windows(recording, domain, n)]
            same = [len(set(window)) == 1 for window in found if -1 not in window]
            row.append(sum(same) / len(same) if same else NAN)
        result.append(row)
    return result


def groups(recording: Recording) -> list[list[set[int]]]:
    """[domains][layers], smallest group by descending gate mass in the domain whose cumulative share reaches 0.85."""
    weights = np.ones(recording.ids.shape) if recording.weights is None else recording.weights
    result = []
    for domain in range(len(recording.domains)):
        per_layer = []
        for layer, width in enumerate(recording.experts):
            mass = [0.0] * width
            for token, document in enumerate(recording.document):
                if recording.domain[document] == domain:
                    ran = [slot for slot, expert in enumerate(recording.ids[token, layer]) if expert >= 0]
                    total = math.fsum(float(weights[token, layer, slot]) for slot in ran)
                    for slot in ran:
                        if total > 0:
                            mass[recording.ids[token, layer, slot]] += float(weights[token, layer, slot]) / total
            chosen: set[int] = set()
            reached = 0.0
            for expert in sorted(range(width), key=lambda e: (-mass[e], e)):
                if reached >= GROUP_SHARE * math.fsum(mass):
                    break
                chosen.add(expert)
                reached += mass[expert]
            per_layer.append(chosen)
        result.append(per_layer)
    return result


def ngram_group_ratio(recording: Recording, n: int) -> list[Vector]:
    """[domains][layers]."""
    chosen = groups(recording)
    result = []
    for domain in range(len(recording.domains)):
        row = []
        for layer in range(len(recording.layers)):
            found = [[primary(recording, token, layer) for token in window] for window in windows(recording, domain, n)]
            inside = [all(expert in chosen[domain][layer] for expert in window) for window in found if -1 not in window]
            row.append(sum(inside) / len(inside) if inside else NAN)
        result.append(row)
    return result


def shuffle_chance(recording: Recording, n: int) -> list[Vector]:
    """[domains][layers], mean ratio of equal primaries over all orders of the tokens of each document (draws without replacement)."""
    result = []
    for domain in range(len(recording.domains)):
        row = []
        for layer in range(len(recording.layers)):
            expected, count = 0.0, 0
            for document, tokens in enumerate(texts(recording)):
                if recording.domain[document] != domain:
                    continue
                found = [primary(recording, token, layer) for token in tokens]
                whole = sum(-1 not in found[start : start + n] for start in range(len(found) - n + 1))
                known = [expert for expert in found if expert >= 0]
                if whole:
                    ways = sum(math.comb(times, n) for times in Counter(known).values())
                    expected += whole * ways / math.comb(len(known), n)
                    count += whole
            row.append(expected / count if count else NAN)
        result.append(row)
    return result


def stability(recording: Recording) -> tuple[list[list[Vector]], list[list[Vector]]]:
    """[noise scales][domains][layers]: share of tokens that kept every chosen expert, and mean share of the chosen that were kept."""
    assert recording.kept is not None
    unchanged, overlap = [], []
    for scale in range(recording.kept.shape[2]):
        same = np.full(recording.kept.shape[:2], NAN)
        part = same.copy()
        for token in range(len(same)):
            for layer in range(same.shape[1]):
                ran = sum(expert >= 0 for expert in recording.ids[token, layer])
                if ran and recording.kept[token, layer, 0] != 255:
                    same[token, layer] = recording.kept[token, layer, scale] == ran
                    part[token, layer] = recording.kept[token, layer, scale] / ran
        unchanged.append(token_mean(recording, same))
        overlap.append(token_mean(recording, part))
    return unchanged, overlap


# ------------------------------------------------------------------------------------------------------------ calibrated


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if not a <= 0)


def mixture(rows: Sequence[Sequence[float]]) -> Vector:
    return [math.fsum(row[expert] for row in rows) / len(rows) for expert in range(len(rows[0]))]


def divergences(rows: Sequence[Sequence[float]]) -> Vector:
    """[domains], KL(p_d || pbar) of one layer."""
    return [kl(row, mixture(rows)) for row in rows]


def specialization(rows: Sequence[Sequence[float]]) -> float:
    return NAN if len(rows) < 2 else math.fsum(divergences(rows)) / len(rows)


def load(rows: Sequence[Sequence[float]]) -> float:
    return kl(mixture(rows), [1 / len(rows[0])] * len(rows[0]))


def der_entropy(rows: Sequence[Sequence[float]]) -> float:
    return NAN if len(rows) < 2 else (exp_entropy(rows) - 1) / (min(len(rows), len(rows[0])) - 1)


def gram(rows: Sequence[Sequence[float]], norms: Sequence[float] | None = None) -> Matrix:
    """Inner products, with other squared norms on the diagonal where they are given."""
    found = [[dot(a, b) for b in rows] for a in rows]
    for place, norm in enumerate(norms or ()):
        found[place][place] = norm
    return found


def der(rows: Sequence[Sequence[float]], norms: Sequence[float] | None = None) -> float:
    """Participation ratio of the domains' inner products."""
    if len(rows) < 2:
        return NAN
    matrix = gram(rows, norms)
    trace = sum(matrix[d][d] for d in range(len(rows)))
    return (trace**2 / sum(value**2 for row in matrix for value in row) - 1) / (min(len(rows), len(rows[0])) - 1)


def unbiased_norm(row: Sequence[float], tokens: float, slots: float) -> float:
    return (dot(row, row) - 1 / slots) / (1 - 1 / tokens) if tokens > 1 else NAN


def token_norms(rows: Sequence[Sequence[float]], tokens: Sequence[float], slots: Sequence[float]) -> Vector:
    """Squared norms that are unbiased for independent tokens; n tokens, nk slots that ran."""
    norms = [unbiased_norm(*sizes) for sizes in zip(rows, tokens, slots, strict=True)]
    return [norm if norm > 0 else NAN for norm in norms]


def document_norm(documents: Sequence[Sequence[float]]) -> float:
    """Squared norm of a domain's usage from products of different documents, every pair by itself."""
    above = below = 0.0
    for i, first in enumerate(documents):
        for j, second in enumerate(documents):
            if i != j:
                above += dot(first, second)
                below += math.fsum(first) * math.fsum(second)
    return above / below if below > 0 else NAN


def isolation_matrix(rows: Sequence[Sequence[float]], norms: Sequence[float]) -> Matrix:
    """[domains][domains], cosines from squared norms."""
    known = [norm if norm > 0 else NAN for norm in norms]
    return [[dot(a, b) / math.sqrt(known[i] * known[j]) for j, b in enumerate(rows)] for i, a in enumerate(rows)]


def isolation_by_domain(rows: Sequence[Sequence[float]], norms: Sequence[float]) -> Vector:
    matrix = isolation_matrix(rows, norms)
    return [1 - mean([matrix[i][j] for j in range(len(rows)) if j != i]) if len(rows) > 1 else NAN for i in range(len(rows))]


def equal_usage(usage: Sequence[Sequence[Sequence[float]]], tokens: Sequence[float], label: Sequence[int], domains: int) -> Vector:
    """Studentized statistic of the test of equal usage, of every domain and of all; hits [documents][layers][experts]."""
    documents = range(len(usage))
    pairs = [[0.0] * len(usage) for _ in documents]
    for layer in range(len(usage[0])):
        rows = [document[layer] for document in usage]
        every = math.fsum(map(math.fsum, rows))
        pooled = [math.fsum(row[e] for row in rows) / every for e in range(len(rows[0]))]
        apart = [
            [tokens[i] * (h / math.fsum(rows[i]) - q) / math.sqrt(q) if q > 0 and math.fsum(rows[i]) > 0 else 0.0
             for h, q in zip(rows[i], pooled, strict=True)]
            for i in documents
        ]  # fmt: skip
        for i in documents:
            for j in documents:
                pairs[i][j] += dot(apart[i], apart[j])
    mean_of, square_of = ([[0.0] * domains for _ in range(domains)] for _ in range(2))
    for d in range(domains):
        for e in range(domains):
            chosen = [(i, j) for i in documents for j in documents if i != j and label[i] == d and label[j] == e]
            scale = math.fsum(tokens[i] * tokens[j] for i, j in chosen)
            if chosen:
                mean_of[d][e] = math.fsum(pairs[i][j] for i, j in chosen) / scale
                square_of[d][e] = math.fsum(pairs[i][j] ** 2 for i, j in chosen) / scale**2
    centre = [[(d == e) - 1 / domains for e in range(domains)] for d in range(domains)]
    forms = [[[a * b for b in row] for a in row] for row in centre]
    forms.append([[mean([form[d][e] for form in forms]) for e in range(domains)] for d in range(domains)])
    cells = [(d, e) for d in range(domains) for e in range(domains)]
    spreads = [math.sqrt(2 * math.fsum(form[d][e] ** 2 * square_of[d][e] for d, e in cells)) for form in forms]
    values = [math.fsum(form[d][e] * mean_of[d][e] for d, e in cells) for form in forms]
    return [value / spread if spread > 0 else 0.0 for value, spread in zip(values, spreads, strict=True)]


def jackknife(values: Callable[[Recording], Vector], recording: Recording) -> tuple[Vector, Vector, Vector]:
    """Delete-one-document jackknife, stratified by domain: corrected values, standard errors, degrees of freedom (Satterthwaite)."""
    whole = values(recording)
    corrected = list(whole)
    variance, fourth = [0.0] * len(whole), [0.0] * len(whole)
    for domain in range(len(recording.domains)):
        members = sorted({int(d) for d in recording.document if recording.domain[d] == domain})
        left_out = [values(recording.take(np.flatnonzero(recording.document != member))) for member in members]
        count = len(members)
        if count == 0:
            continue
        for place in range(len(whole)):
            column = [value[place] for value in left_out]
            centre = math.fsum(column) / count
            corrected[place] += (count - 1) * (whole[place] - centre)
            part = (count - 1) / count * math.fsum((value - centre) ** 2 for value in column)
            variance[place] += part
            fourth[place] += part**2 / max(count - 1, 1)
    freedom = [NAN if math.isnan(low) else high**2 / low if low > 0 else math.inf for high, low in zip(variance, fourth, strict=True)]
    return corrected, [math.sqrt(value) for value in variance], freedom


# ------------------------------------------------------------------------------------------------------------ companions


def utilization(rows: Sequence[Sequence[float]]) -> float:
    return math.fsum(min(value, 1 / len(rows[0])) for value in mixture(rows))


def maxvio(rows: Sequence[Sequence[float]]) -> float:
    bar = mixture(rows)
    average = math.fsum(bar) / len(bar)
    return (max(bar) - average) / average


def load_entropy(rows: Sequence[Sequence[float]]) -> float:
    return -math.fsum(value * math.log(value) for value in mixture(rows) if not value <= 0)


def dead(rows: Sequence[Sequence[float]]) -> int:
    return sum(value == 0 for value in mixture(rows))


def purity(counts: Sequence[Sequence[float]]) -> float:
    return math.fsum(max(row[e] for row in counts) for e in range(len(counts[0]))) / math.fsum(flat(counts))


def any_overlap_chance(experts: int, k: int) -> float:
    return 1 - math.comb(experts - k, k) / math.comb(experts, k)


def neighbours(recording: Recording, domain: int, layer: int) -> tuple[float, float]:
    """Shares of neighbouring tokens whose sets overlap at all, and mean overlap / k."""
    some, overlap, count = 0, 0.0, 0
    for first, second in windows(recording, domain, 2):
        a = {int(e) for e in recording.ids[first, layer] if e >= 0}
        b = {int(e) for e in recording.ids[second, layer] if e >= 0}
        if not a or not b:
            continue
        count += 1
        some += bool(a & b)
        overlap += len(a & b) / recording.slots(layer)
    return (some / count, overlap / count) if count else (NAN, NAN)


def coactivation(recording: Recording, layer: int) -> Matrix:
    """[experts][experts], tokens that ran both (diagonal: tokens that ran the expert)."""
    counts = [[0.0] * recording.experts[layer] for _ in range(recording.experts[layer])]
    for row in recording.ids[:, layer]:
        ran = [int(expert) for expert in row if expert >= 0]
        for expert in ran:
            counts[expert][expert] += 1
        for a, b in combinations(ran, 2):
            counts[a][b] += 1
            counts[b][a] += 1
    return counts


def transitions(recording: Recording, layer: int) -> Matrix:
    """[experts of layer][experts of the next layer], pairs of slots of one token."""
    counts = [[0.0] * recording.experts[layer + 1] for _ in range(recording.experts[layer])]
    for token in range(len(recording.document)):
        for a in recording.ids[token, layer]:
            for b in recording.ids[token, layer + 1]:
                if a >= 0 and b >= 0:
                    counts[a][b] += 1
    return counts


def mutual_information(joint: dict[tuple[Any, Any], float]) -> float:
    total = math.fsum(joint.values())
    left: dict[Any, float] = {}
    right: dict[Any, float] = {}
    for (a, b), value in joint.items():
        left[a] = left.get(a, 0.0) + value
        right[b] = right.get(b, 0.0) + value
    return math.fsum(value / total * math.log(value * total / (left[a] * right[b])) for (a, b), value in joint.items() if value > 0)


# ------------------------------------------------------------------------------------------------- whole tables of values


def routed(recording: Recording) -> list[Vector]:
    """[domains][layers], tokens with at least one slot that ran."""
    counts = [[0.0] * len(recording.layers) for _ in recording.domains]
    for token, document in enumerate(recording.document):
        for layer in range(len(recording.layers)):
            counts[recording.domain[document]][layer] += bool((recording.ids[token, layer] >= 0).any())
    return counts


def domain_metrics(recording: Recording, *, by_documents: bool = False) -> dict[str, list[Vector]]:
    """Values [domains + 1][layers + 1] (last row, last column: means) of the calibrated domain metrics; DER [1][layers + 1].

    Norms are unbiased for independent tokens, or, ``by_documents``, made of products of different documents.
    """
    counts = hits(recording)
    p = profile(recording)
    sums = of_domain(recording, hits(recording))
    tokens = routed(recording)
    domains, layers = len(recording.domains), len(recording.layers)
    cells: dict[str, list[Vector]] = {name: [[NAN] * layers for _ in range(domains)] for name in ("specialization", "domain_isolation")}
    cells["specialization_normalized"] = [[NAN] * layers for _ in range(domains)]
    ranks = []
    for layer in range(layers):
        experts, k = recording.experts[layer], recording.slots(layer)
        rows = [p[domain][layer] for domain in range(domains)]
        if domains < 2 or experts <= k:
            ranks.append(NAN)
            continue
        norms = token_norms(rows, [row[layer] for row in tokens], [math.fsum(sums[domain][layer]) for domain in range(domains)])
        if by_documents:
            own = [[counts[i][layer] for i in range(len(counts)) if recording.domain[i] == domain] for domain in range(domains)]
            norms = [document_norm(documents) for documents in own]
        isolation = isolation_by_domain(rows, norms)
        bound = min(math.log(domains), math.log(experts / k))
        for domain, divergence in enumerate(divergences(rows)):
            cells["specialization"][domain][layer] = divergence
            cells["specialization_normalized"][domain][layer] = divergence / bound
            cells["domain_isolation"][domain][layer] = isolation[domain]
        ranks.append(der(rows, norms))
    table = {name: with_means(values) for name, values in cells.items()}
    table["der"] = [[*ranks, mean(ranks)]]
    return table


def with_means(cells: list[Vector]) -> list[Vector]:
    rows = [list(row) for row in cells] + [[mean([row[layer] for row in cells]) for layer in range(len(cells[0]))]]
    return [[*row, mean(row)] for row in rows]


def published(recording: Recording) -> dict[str, tuple[Vector, Vector | None]]:
    """By domain, and by layer where there is such a value; n-gram metrics are named ``ngram_ratio 2``."""
    p = profile(recording)
    layers = range(len(recording.layers))
    width = max(recording.experts)
    padded = [[[*row, *[0.0] * (width - len(row))] for row in rows] for rows in p]
    alike = [di([rows[layer] for rows in p]) for layer in layers]
    cells = {"rs": rs(p)}
    if recording.margins is not None:
        cells["rss"] = token_mean(recording, recording.margins)
    if recording.weights is not None or recording.ids.shape[2] == 1:
        for n in (2, 5, 10, 20):
            cells[f"ngram_ratio {n}"] = ngram_ratio(recording, n)
            cells[f"ngram_group_ratio {n}"] = ngram_group_ratio(recording, n)
    table: dict[str, tuple[Vector, Vector | None]] = {
        name: ([mean(row) for row in rows], [mean([row[layer] for row in rows]) for layer in layers]) for name, rows in cells.items()
    }
    table["ner"] = ([ner(rows) for rows in padded], None)
    table["ner_entropy"] = ([ner_entropy(rows) for rows in padded], None)
    table["di"] = (di([flat(rows) for rows in p]), [mean(row) for row in alike])
    return table


def of_trace(trace: Trace) -> Recording:
    """The raw arrays of a trace of one shard."""
    (routes,) = tuple(trace)
    mark = np.iinfo(routes.ids.dtype).max
    ids = routes.ids.astype(np.int64)
    return Recording(
        ids=np.where(ids == mark, -1, ids),
        document=routes.document,
        domain=trace.shape.document_domain,
        domains=trace.shape.domains,
        layers=trace.shape.layers,
        experts=trace.shape.experts,
        weights=routes.weights,
        token_ids=routes.token_ids,
    )


def cases() -> dict[str, Recording]:
    """Recordings on which package and loops are compared: ordinary ones, and every awkward kind that a user may bring."""
    two_empty = random_recording(6, documents=(3, 2, 2))
    gaps = random_recording(16, documents=(4, 4, 4), length=(15, 40))
    return {
        "plain": random_recording(1, length=(18, 40)),
        "missing slots": random_recording(2, top_k=3, missing=0.3, length=(18, 40)),
        "layers of different width": random_recording(3, experts=(4, 9, 6), length=(18, 40)),
        "fewer experts than domains in one layer": random_recording(
            13, experts=(3, 9), layers=2, documents=(3, 3, 3, 2, 2), length=(20, 30)
        ),
        "k = 1": random_recording(4, top_k=1, length=(20, 40)),
        "k = 1 without weights": random_recording(4, top_k=1, extras=False, length=(20, 40)),
        "without weights, margins and token ids": random_recording(5, extras=False),
        "one domain": random_recording(7, documents=(5,), length=(20, 30)),
        "one document per domain": random_recording(8, documents=(1, 1, 1), length=(25, 40)),
        "one document in one domain": random_recording(9, documents=(3, 1, 3), length=(25, 40)),
        "domain without tokens": two_empty.take(np.flatnonzero(two_empty.domain[two_empty.document] != 1)),
        "k = E": random_recording(10, experts=3, top_k=3, length=(20, 30)),
        "k = E at one layer": random_recording(11, experts=(2, 8), layers=2, length=(20, 30)),
        "more domains x k than experts": random_recording(12, documents=(3, 3, 3, 3, 3), experts=6, top_k=2, length=(20, 30)),
        "dead experts": random_recording(14, skew=6.0, experts=20, length=(20, 30)),
        "many experts": random_recording(15, experts=300, top_k=4, length=(20, 30)),
        "documents without tokens": gaps.take(np.flatnonzero(~np.isin(gaps.document, (1, 5, 11)))),
    }
