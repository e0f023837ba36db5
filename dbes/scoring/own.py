"""Metrics of the user's own: a function of a layer's expert counts, treated from there on like the metrics of the package."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dbes.errors import SettingError
from dbes.result_parts import OwnMetric
from dbes.scoring.draws import draw_variance
from dbes.scoring.estimates import CALIBRATED, Measured
from dbes.scoring.grouping import Grouping
from dbes.scoring.layer_counts import LayerCounts
from dbes.scoring.permutation import domain_sums
from dbes.scoring.resampling import batches, with_mean
from dbes.text import clipped
from dbes.trace.baselines import expert_blocks

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")

RESERVED = ("_excess", "_domain")
"""Ends of names that stand for something else beside a result."""

Problems = dict[str, str]
"""What of a metric is unknown at a layer (``value``, ``interval``, ``chance``, ``ideal router``), and why."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    r"""A metric of your own: a function of the expert counts of one layer, measured like the metrics of dbes.

    The function gets an array of numbers [domains, experts], how often each domain chose each expert of the layer, and gives one number
    or, with ``per_domain``, one for each domain (then the layer's is their mean). The model's is the mean over layers. dbes calls it for
    the recording, without each document (interval), under shuffled labels (chance), for the random router (excess), and for the ideal
    router (bound). The function must not change what it is given. Where it raises, or gives NaN, the layer is NaN, with the reason
    among the warnings. The score,

    .. math:: score = (corrected - zero) / (bound - zero)

    is 0 where domains use the experts alike and 1 for the ideal router, and larger is more, also where the bound lies below ``zero``.

    Attributes:
        name: by which it is found in results and compared; small letters, digits and ``_``.
        function: of [domains, experts]; with ``unit`` "documents" of [documents, experts] and int [documents], the domain of each.
        title, meaning: heading and one sentence for reports.
        per_domain: the function gives one number for each domain.
        unit: "domains", or "documents" where it needs the counts of each document.
        counts: "hits" (all k slots), "mass" (gate weight) or "primaries" (the slot with the largest weight).
        zero: its value where all domains use the experts alike.
        bound: "ideal": its value for the ideal domain router; or that value as a number; None: there is none, and the score is the
            distance of the value from ``zero``.
        better: without a bound, whether "higher" or "lower" values are more.
        chance: whether shuffled labels and the test that domains use the experts alike, which all domain metrics share, mean anything
            to it. False for what compares no domains, as load does.
        place: FILE.py:NAME where the command line found it.
        version: raise it whenever what the function computes changes; results of another version, or of other source, are not compared.

    Raises:
        SettingError: a name that cannot be used, or a value that means nothing.
    """

    name: str
    function: Callable[..., Any]
    title: str = ""
    meaning: str = ""
    per_domain: bool = False
    unit: Literal["domains", "documents"] = "domains"
    counts: Literal["hits", "mass", "primaries"] = "hits"
    zero: float = 0.0
    bound: Literal["ideal"] | float | None = "ideal"
    better: Literal["higher", "lower"] = "higher"
    chance: bool = True
    version: int = 1
    place: str = ""

    def __post_init__(self) -> None:
        known = {"unit": ("domains", "documents"), "counts": ("hits", "mass", "primaries"), "better": ("higher", "lower")}
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name) or self.name.endswith(RESERVED) or self.name in CALIBRATED:
            raise SettingError(
                f"metric {clipped(self.name)!r}: expected a name of small letters, digits and _ that no metric of dbes has, "
                f"and that ends neither with {RESERVED[0]} nor {RESERVED[1]}"
            )
        if not callable(self.function):
            raise SettingError(f"metric {self.name!r}: function: expected a function, got {type(self.function).__name__}")
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise SettingError(f"metric {self.name!r}: {name} {getattr(self, name)!r}: expected one of {', '.join(values)}")
        if not _finite(self.zero) or not (self.bound in ("ideal", None) or _finite(self.bound)):
            raise SettingError(f"metric {self.name!r}: zero: expected a number; bound: expected 'ideal', a number or None")
        if not isinstance(self.version, int) or self.version < 1:
            raise SettingError(f"metric {self.name!r}: version {self.version!r}: expected a whole number of at least 1")

    @cached_property
    def sha256(self) -> str | None:
        """Of the source of the module the function is in, or of the function alone (notebooks); None where nobody knows it."""
        for what in (inspect.getmodule(self.function), self.function):
            try:
                return hashlib.sha256(inspect.getsource(what).encode()).hexdigest()  # type: ignore[arg-type]
            except (OSError, TypeError):
                continue
        return None

    @property
    def facts(self) -> OwnMetric:
        """What a result keeps of it."""
        names = ("meaning", "per_domain", "unit", "counts", "better", "chance", "version", "sha256", "place")
        bound = self.bound if self.bound in ("ideal", None) else float(self.bound)
        more = {name: getattr(self, name) for name in names}
        return OwnMetric(title=self.title or self.name, zero=float(self.zero), bound=bound, **more)


def _finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def checked(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """The metrics, when they can be measured together.

    Raises:
        SettingError: what is given is no metric, or two have one name.
    """
    found = tuple(metrics)
    for each in found:
        if not isinstance(each, Metric):
            raise SettingError(f"metrics: expected dbes.Metric(name=..., function=...), got {type(each).__name__}")
    if twice := {each.name for each in found if sum(other.name == each.name for other in found) > 1}:
        raise SettingError(f"metrics: {min(twice)!r} twice; every metric needs a name of its own")
    return found


def metric_from(place: str) -> Metric:
    """The metric ``FILE.py:NAME``. The file is run, as any program that a user starts.

    Raises:
        SettingError: no such file or name, it fails as it is run, or what is found is no metric.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier() or not path.is_file():
        raise SettingError(f"metric {place!r}: expected FILE.py:NAME, a file that is there and the name of a dbes.Metric in it")
    module_name = f"dbes_metric_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise SettingError(f"metric {place!r}: {path} is no Python file; its name has to end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # by which its dataclasses and its source are found
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # whatever code of the user's raises
        raise SettingError(f"metric {place!r}: running {path} failed: {_told(problem)}") from problem
    found = vars(module).get(name)
    if not isinstance(found, Metric):
        there = [key for key, value in vars(module).items() if isinstance(value, Metric)]
        raise SettingError(f"metric {place!r}: {name} is no dbes.Metric; in {path} there are: {', '.join(there) or 'none'}")
    return replace(found, place=place)


def own_measured(
    metrics: Sequence[Metric], sums: LayerCounts, labels: np.ndarray | None, *, grouping: Grouping | None, control: bool = False
) -> tuple[dict[str, Measured], dict[str, Problems]]:
    """Every metric of one layer as the metrics of the package are measured, and what is unknown of it.

    Args:
        labels: [permutations, documents], see ``permuted_labels``; None for a control, whose chance level nobody asks for.
        grouping, control: as in ``measure_layer``.
    """
    found, problems = {}, {}
    for metric in metrics:
        layer = _Layer(metric, sums, grouping)
        found[metric.name] = layer.measured(labels, control=control)
        if layer.problems:
            problems[metric.name] = layer.problems
    return found, problems


class _Layer:
    """One metric at one layer; what could not be computed is noted as it is met."""

    def __init__(self, metric: Metric, sums: LayerCounts, grouping: Grouping | None) -> None:
        self.metric, self.problems = metric, Problems()
        self.shape = sums.shape
        self.domains = len(self.shape.domains)
        self.rows = self.domains + 1 if metric.per_domain else 1
        self.label = self.shape.document_domain if grouping is None else grouping.groups.label
        table = {"hits": sums.hits, "mass": sums.mass, "primaries": None if sums.ngrams is None else sums.ngrams.primaries}[metric.counts]
        self.table = None if table is None else table[:, 0]
        self.unit = self.table if grouping is None or self.table is None else grouping.groups.add(self.table)

    def measured(self, labels: np.ndarray | None, *, control: bool) -> Measured:
        metric, unknown = self.metric, np.full(self.rows, np.nan)
        value, left_out, null = unknown, np.full((len(self.label), self.rows), np.nan), None if labels is None else unknown
        ideal = draws = unknown
        experts, top_k = self.shape.experts[0], self.shape.top_k[0]
        if self.table is None or self.unit is None:
            self.problems["value"] = f"the recording has no gate weights, which {metric.counts} are made of"
        elif experts <= top_k and metric.counts == "hits":
            self.problems["value"] = "every expert is used by every token"
        elif not np.isnan(value := self._call("value", self.unit, self.label)).any():
            left_out = self._without_each()
            if labels is not None and metric.chance and len(labels):
                null = self._null(self.table, labels)
            if metric.bound == "ideal":
                ideal = self._call("ideal router", self._ideal(self.unit, experts, top_k), self.label)
            if control:
                draws = draw_variance(self._without_each_expert())
        reference = np.full(self.rows, float(metric.bound)) if isinstance(metric.bound, int | float) else ideal
        sign = 1.0 if metric.better == "higher" else -1.0
        return Measured(
            value=value,
            whole=value,
            left_out=left_out,
            null=null if metric.chance else None,
            reference=reference,
            zero=np.full(self.rows, float(metric.zero)),
            span=np.full(self.rows, sign) if metric.bound is None else reference - metric.zero,
            draw_variance=draws if control else None,
        )

    def _call(self, what: str, table: np.ndarray, label: np.ndarray) -> np.ndarray:
        """The metric of some documents [rows]; NaN where the function cannot say."""
        if self.metric.unit == "documents":
            return self._checked(what, np.array(table, np.float64), np.array(label))
        counts = np.stack([table[label == domain].sum(axis=0, dtype=np.float64) for domain in range(self.domains)])
        return self._checked(what, counts)

    def _checked(self, what: str, *given: np.ndarray) -> np.ndarray:
        """What the function gives, with the mean of domains last.

        Raises:
            SettingError: it gives something else than numbers of the right shape.
        """
        metric = self.metric
        for each in given:
            each.setflags(write=False)
        try:
            with np.errstate(all="ignore"):
                found = metric.function(*given)
        except Exception as problem:  # whatever code of the user's raises is told, as a reason for NaN
            self.problems.setdefault(what, _told(problem))
            return np.full(self.rows, np.nan)
        expected = (self.domains,) if metric.per_domain else ()
        try:
            array = np.asarray(found)
        except ValueError:
            array = np.asarray(None)
        if array.shape != expected or array.dtype.kind not in "biuf":
            numbers = f"{self.domains} numbers, one for each domain" if metric.per_domain else "one number"
            want = f"{numbers} (per_domain={metric.per_domain})"
            got = f"{array.dtype} {array.shape}" if isinstance(found, np.ndarray) else type(found).__name__
            raise SettingError(f"metric {metric.name!r}: its function has to give {want}; it gave {got}")
        array = array.astype(np.float64)
        if np.isnan(array).any():
            self.problems.setdefault(what, "its function gives NaN")
        return with_mean(array) if metric.per_domain else array[None]

    def _without_each(self) -> np.ndarray:
        """The metric without each document, [documents, rows]."""
        assert self.unit is not None
        unit, label = self.unit, self.label
        if self.metric.unit == "documents":
            every = np.arange(len(label))
            return np.stack([self._call("interval", unit[every != each], label[every != each]) for each in every])
        counts = np.stack([unit[label == domain].sum(axis=0, dtype=np.float64) for domain in range(self.domains)])
        found = []
        for row, domain in zip(unit, label, strict=True):
            fewer = counts.copy()
            fewer[domain] -= row
            found.append(self._checked("interval", fewer))
        return np.stack(found)

    def _null(self, table: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Mean of the metric under permuted labels, [rows]."""
        if self.metric.unit == "documents":
            return np.mean([self._call("chance", table, each) for each in labels], axis=0)
        sums, drawn = domain_sums(table.astype(np.float32), self.domains), []
        for batch in batches(labels, self.domains * (table.shape[1] + len(table))):
            drawn += [self._checked("chance", each) for each in sums(batch).astype(np.float64)]
        return np.mean(drawn, axis=0)

    def _ideal(self, table: np.ndarray, experts: int, top_k: int) -> np.ndarray:
        """What the ideal router gives the same documents on average, [documents, experts]."""
        usage = np.zeros((self.domains, experts))
        for domain, block in enumerate(expert_blocks(self.domains, experts, top_k)):
            usage[domain, block] = 1 / len(block)
        return table.sum(axis=1, dtype=np.float64, keepdims=True) * usage[self.label]

    def _without_each_expert(self) -> np.ndarray:
        """The metric without what each expert got, [experts, rows]: how much another draw of a random router would change."""
        assert self.unit is not None
        found = []
        for expert in range(self.unit.shape[1]):
            fewer = self.unit.copy()
            fewer[:, expert] = 0
            found.append(self._call("random router", fewer, self.label))
        return np.stack(found)


def _told(problem: BaseException) -> str:
    return clipped(f"{type(problem).__name__}: {problem}".replace("\n", " "))


def own_warnings(metrics: Sequence[Metric], problems: Sequence[dict[str, Problems]], layers: Sequence[int]) -> list[str]:
    """What is unknown of the metrics, and at which layers.

    Args:
        problems: of each layer.
    """
    told: dict[tuple[str, str, str], list[int]] = {}
    for layer, found in zip(layers, problems, strict=True):
        for name, each in found.items():
            for what, reason in each.items():
                told.setdefault((name, what, reason), []).append(layer)
    found = [
        f"metric {name!r}: {what} unknown at {'every layer' if len(at) == len(layers) else 'layer ' + ', '.join(map(str, at))}: {reason}"
        for (name, what, reason), at in told.items()
    ]
    return found + [
        f"metric {each.name!r}: its source cannot be read, so that only its version tells it from another of its name"
        for each in metrics
        if each.sha256 is None
    ]

