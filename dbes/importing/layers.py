"""Files that hold one layer each: which layer, and which files belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from dbes.errors import SourceError
from dbes.importing.sizes import MOST_LAYERS, ModelSizes
from dbes.importing.types import Source
from dbes.text import clipped

NAMED, LAST = re.compile(r"layers?[._-]?(\d{1,5})(?!\d)", re.IGNORECASE), re.compile(r"(\d{1,5})(?!.*\d)")

Groups = dict[str, dict[int, list[Source]]]


def by_layer(sources: Sequence[Source], sizes: ModelSizes) -> Groups:
    """Files by folder and by layer, layers ascending.

    The number follows ``layer`` in the name of the file or of its folder (several files then go on one after the other), or is the last
    number in the name of the file.

    Raises:
        SourceError: a name without a number, two files of one layer that are no parts, folders with other layers than the first or
            the config.
    """
    groups: Groups = {}
    for source in sources:
        path = PurePosixPath(source.name.removesuffix(".gz"))
        named, folder = NAMED.search(path.stem), NAMED.search(path.parent.name)
        if named is None and folder is not None:
            groups.setdefault(str(path.parent.parent), {}).setdefault(int(folder[1]), []).append(source)
            continue
        found = named or LAST.search(path.stem)
        if found is None or int(found[1]) >= MOST_LAYERS:
            raise SourceError(f"{source}: its name does not tell the layer; expected names such as layer_3")
        own = groups.setdefault(str(path.parent), {})
        if int(found[1]) in own:
            raise SourceError(f"{source}: another file of layer {int(found[1])} stands beside it ({own[int(found[1])][0].name})")
        own[int(found[1])] = [source]
    ordered = {name: dict(sorted(layers.items())) for name, layers in groups.items()}
    first = next(iter(ordered.values()), {})
    for name, layers in ordered.items():
        if layers.keys() != first.keys():
            raise SourceError(f"{name}: layers {clipped(list(layers))}, but the first folder has {clipped(list(first))}")
        if sizes.moe_layers is not None and tuple(layers) != sizes.moe_layers:
            known = clipped(list(sizes.moe_layers))
            raise SourceError(f"{name}: layers {clipped(list(layers))}, but by {sizes.where} those with experts are {known}")
    return ordered
