"""The tokens of an experiment as one file, which its processes read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save

from dbes.errors import InterventionError
from dbes.files import write_bytes
from dbes.intervention.data import ITEM_COLUMNS, ExperimentData, Items, Part, digest_of
from dbes.scoring.tables import read_safetensors
from dbes.text import clipped


def save_data(data: ExperimentData, path: Path) -> None:
    arrays = {}
    for (domain, name), part in data.parts.items():
        index = data.domains.index(domain)
        arrays |= {f"{index}.{name}.tokens": part.tokens, f"{index}.{name}.starts": part.starts, f"{index}.{name}.bytes": part.bytes}
    for domain, items in data.items.items():
        arrays |= {f"{data.domains.index(domain)}.items.{column}": getattr(items, column) for column in ITEM_COLUMNS}
    write_bytes(path, save(arrays))


def load_data(path: Path, *, domains: Sequence[str], boundary: int, digest: str) -> ExperimentData:
    """What ``save_data`` wrote.

    Raises:
        InterventionError: the file is damaged, or of other domains.
    """
    again = "remove it and run the same command again"
    arrays = read_safetensors(path, error=InterventionError, hint=again)[1]
    parts, items = {}, {}
    try:
        # safetensors gives them in another order each time; what is drawn from several domains depends on theirs
        for index, name, column in sorted((key.split(".") for key in arrays), key=lambda key: (int(key[0]), *key[1:])):
            domain = domains[int(index)]
            if name == "items":
                items[domain] = Items(**{column: arrays[f"{index}.items.{column}"] for column in ITEM_COLUMNS})
            elif column == "tokens":
                parts[domain, name] = Part(**{column: arrays[f"{index}.{name}.{column}"] for column in ("tokens", "starts", "bytes")})
    except (KeyError, IndexError, ValueError) as problem:
        raise InterventionError(f"{path}: not the data of this experiment ({clipped(str(problem))}); {again}") from None
    if digest_of(parts, items) != digest:
        raise InterventionError(f"{path}: other documents than experiment.json says; {again}")
    return ExperimentData(domains=tuple(domains), parts=parts, boundary=boundary, digest=digest, items=items)
