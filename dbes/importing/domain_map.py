"""Which domain a document is of, and which text it is a piece of: what a domain map says, or else the file itself."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from dbes.errors import SettingError
from dbes.importing.types import Notes, Source
from dbes.schema import Strict, read_json, read_yaml, validated
from dbes.text import clipped

DOMAIN = "domain"


class Place(Strict):
    """Where a document belongs."""

    domain: str = Field(min_length=1)
    document: str | None = None


class Rules(Strict):
    """A domain map with all that it can say.

    Attributes:
        paths: globs over the paths of sources to domains; the first that fits counts.
        ids: globs over document (request) ids to a domain, or to a domain and the text that the document is a piece of.
        field: name of a field of the file's records whose value is the domain.
        document: name of a field; documents of equal value are pieces of one text.
        leave_out: fields with a value; documents that have it are left out.
    """

    paths: dict[str, str] = Field(default_factory=dict)
    ids: dict[str, str | Place] = Field(default_factory=dict)
    field: str | None = None
    document: str | None = None
    leave_out: dict[str, bool | int | str] = Field(default_factory=dict)


class DomainMap:
    """Names the domain of documents, and remembers which of its entries were of use."""

    def __init__(self, rules: Rules | None) -> None:
        self.rules = rules
        self._idle = dict.fromkeys([*(rules.paths if rules else ()), *(rules.ids if rules else ())])

    def place(self, source: Source, name: str, fields: Mapping[str, Any], *, otherwise: str | None) -> Place | None:
        """Domain of a document, and the text it is a piece of; None where the map has no entry for it.

        Without a map the domain is the field ``domain`` of the record, else ``otherwise``, else ``all``.
        """
        rules = self.rules
        own = fields.get(DOMAIN)
        if rules is None:
            return Place(domain=_label(own) or otherwise or "all")
        if any(name in fields and fields[name] == value for name, value in rules.leave_out.items()):
            return None
        text = _label(fields.get(rules.document)) if rules.document is not None else None
        for glob, found in rules.ids.items():
            if fnmatchcase(name, glob):
                self._idle.pop(glob, None)
                place = found if isinstance(found, Place) else Place(domain=found)
                return place if place.document is not None else Place(domain=place.domain, document=text)
        if rules.field is not None and (domain := _label(fields.get(rules.field))):
            return Place(domain=domain, document=text)
        for glob, domain in rules.paths.items():
            if _fits(source.name, glob):
                self._idle.pop(glob, None)
                return Place(domain=domain, document=text)
        if not rules.paths and not rules.ids and rules.field is None:  # the map speaks of texts only
            return Place(domain=_label(own) or otherwise or "all", document=text)
        return None

    def tell(self, notes: Notes) -> None:
        """Mention entries that fitted nothing: most often a mistyped glob."""
        for glob in self._idle:
            notes.add(f"the domain map's entry {clipped(glob)!r} fits nothing that was imported")


def read_domain_map(given: str | Path | Mapping[str, Any] | None) -> DomainMap:
    """A domain map from a YAML or JSON file, or from a mapping.

    Raises:
        SettingError: it cannot be read, or is neither globs with domains nor the rules of ``Rules``.
    """
    if given is None:
        return DomainMap(None)
    if isinstance(given, Mapping):
        content, where = dict(given), "domain_map"
    else:
        path, where = Path(given), str(given)
        content = read_json(path, error=SettingError, most=2**26) if path.suffix == ".json" else read_yaml(path, error=SettingError)
    if not isinstance(content, dict) or not content:
        raise SettingError(f"{where}: expected a mapping of globs over source paths to domains, such as {{\"law/*\": \"law\"}}")
    if not set(content) <= set(Rules.model_fields):
        content = {"paths": content}
    return DomainMap(validated(Rules, content, where=where, error=SettingError))


def _fits(name: str, glob: str) -> bool:
    """Whether a path, or the end of it, fits a glob; a ``*`` does not cross folders, ``**`` stands for any of them."""
    if "**" in glob:
        return fnmatchcase(name, glob) or fnmatchcase(name, f"*/{glob}")
    return PurePosixPath(name).match(glob)


def _label(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and str(value) else None
