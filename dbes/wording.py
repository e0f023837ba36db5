"""Numbers as readers see them: one way to write a share, a p-value, a whole number, a count of things."""

from __future__ import annotations

import math
import re

from dbes.errors import SettingError

UNKNOWN = "–"
NOTHING = 1e-9
"""Shares closer to 0 than this are rounding errors and written as 0."""

MORE_DIGITS = 2
"""Further decimals that a share may get before it is written as 0 although it is not."""

SIZES = ((0.01, "very small"), (0.05, "small"), (0.2, "moderate"), (0.5, "large"), (math.inf, "very large"))
"""Words for scores, each for those below its number; 1 is the ideal router. Only scores that are above chance get one."""


def size_word(score: float) -> str:
    """``very small`` below 1 % of the ideal router, ``small`` below 5 %, ``moderate`` below 20 %, ``large`` below 50 %, ``very large``."""
    return next(word for below, word in SIZES if score < below)


def share(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A share in percent: ``12.3%``; ``–`` for NaN and None. What is not 0 is never written as ``0.0%`` or ``-0.0%``.

    Args:
        digits: decimals; a share that they would round to 0 gets up to ``MORE_DIGITS`` more.
        sign: write the plus of a positive share, for differences.
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    plus = "+" if sign else ""
    if abs(value) < NOTHING:
        return f"{0:.{digits}%}"
    for decimals in range(digits, digits + MORE_DIGITS + 1):
        text = f"{value:{plus}.{decimals}%}"
        if float(text.rstrip("%")) != 0:
            return text
    least = f"{10 ** -(digits + MORE_DIGITS):.{digits + MORE_DIGITS}f}%"
    return f"{plus}<{least}" if value > 0 else f">-{least}"


def portion(value: float | None) -> str:
    """Which part of a value something is, in whole percent: ``21%``, ``<1%``; its digits are less certain than those of a score."""
    return "<1%" if value is not None and 0 < value < 0.01 else share(value, 0)


def shares(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """An interval of shares, ``1.0% to 2.0%``; ``–`` where an end is unknown."""
    ends = share(low, sign=sign), share(high, sign=sign)
    return UNKNOWN if UNKNOWN in ends else " to ".join(ends)


def plus_minus(low: float | None, high: float | None) -> str:
    """Half the width of an interval of shares, in percentage points, `` ±1.2``; empty where an end is unknown."""
    if low is None or high is None or not math.isfinite(high - low):
        return ""
    return f" ±{100 * (high - low) / 2:.1f}"


def p_cell(p: float | None) -> str:
    """A p-value for a table: ``0.012``, ``<0.001``; never rounded onto the threshold 0.05 from above."""
    if p is None or math.isnan(p):
        return UNKNOWN
    if p < 0.001:
        return "<0.001"
    return f"{p:.4f}" if 0.05 < p < 0.0505 else f"{p:.3f}"


def p_words(p: float) -> str:
    """A p-value for a sentence: ``p = 0.012``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def whole(number: float | None) -> str:
    """A count with every digit and separators of thousands; a mean of counts that is not whole with one decimal."""
    if number is None or not math.isfinite(number):
        return UNKNOWN
    return f"{int(number):,}" if number == int(number) else f"{number:,.1f}"


def counted(number: int, thing: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def span(numbers: list[int]) -> str:
    """The smallest and the largest of some whole numbers: ``3``, ``3 to 5``."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def task_words(name: str, version: int | None, fingerprint: str | None) -> str:
    """A task by name, version and fingerprint, as far as they are known."""
    known = f", version {version}" if version is not None else ""
    return f"{name}{known}, {'no fingerprint' if fingerprint is None else f'fingerprint {fingerprint}'}"


def byte_count(number: float) -> str:
    """Bytes with three digits and a unit of thousands: ``512 MB``, ``23.1 GB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if round(number, 1) < 1000 or unit == "TB":
            return f"{number:,.0f} {unit}" if unit == "bytes" or number >= 99.95 else f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """About how long: ``40 s``, ``12 min``, ``5.1 h``, ``3.2 days``."""
    for most, size, unit in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h"), (math.inf, 86_400, "days")):
        if seconds < most:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:,.0f} {unit}"
    return UNKNOWN


def bytes_of(text: str, *, option: str) -> int:
    """The number of bytes that a size such as ``64GiB``, ``3 GB`` or ``1000000`` says.

    Raises:
        SettingError: names the option.
    """
    powers = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise SettingError(f"{option} {text!r}: expected a size such as 64GiB or 3GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** powers[found[2].lower()])
