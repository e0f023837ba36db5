"""A task as a folder that needs no network: every source as JSON lines with its sha256, the task file that reads them, and a card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dbes.errors import TaskError
from dbes.files import locked, sha256_of, write_bytes, write_json, write_text
from dbes.schema import Strict, read_versioned
from dbes.tasks.documents import Document
from dbes.tasks.sources import DatasetSource, FileSource, OneSource
from dbes.tasks.task import Task, read_source
from dbes.text import clipped
from dbes.wording import counted

CARD = "CARD.md"
NOT_SAID = "not said"


class Kept(Strict):
    """What stands beside the texts of a prepared source; written after them, so that what it describes is whole.

    Attributes:
        asked: sha256 of what the task says of the source and the digests of its local files; another one is prepared again.
        revision: of the data set, None where the hub was not asked.
        left_out: rows that were left out, by reason.
    """

    schema_version: Literal[1] = 1
    asked: str
    sha256: str
    revision: str | None
    documents: int
    left_out: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One source of a prepared task.

    Attributes:
        file: its texts, relative to the folder.
        kept: what is known of them; None where it could not be had.
        again: it was there already.
        cause: why it could not be had.
    """

    domain: str
    name: str
    part: OneSource
    file: str
    kept: Kept | None = None
    again: bool = False
    cause: str = ""


def prepare(
    task: Task, out: Path, *, allow_missing: bool = False, said: Callable[[str], None] | None = None
) -> tuple[Path, list[Prepared]]:
    """Write a task and all its texts to a folder, and say which file is the task.

    Sources that are there, whole and of the same description, are not read again: what a killed or failed call has finished stays.

    Args:
        allow_missing: go on without sources that cannot be had, and name them in task and card; a domain without any is left out.
        said: told of each source when it is done.

    Raises:
        TaskError: a source cannot be had (each with its cause), or fewer than two domains are left.
        FileError: the folder cannot be written to, or another process writes to it.
    """
    with locked(out):
        found: list[Prepared] = []
        taken: set[str] = set()
        for number, (domain, part) in enumerate(task.parts()):
            name = _name(part, number, domain, taken)
            found.append(_source(task, out, domain, name, part))
            if said is not None:
                said(_told(found[-1]))
        missing = [each for each in found if each.kept is None]
        if missing and not allow_missing:
            causes = "; ".join(f"{each.domain}/{each.name}: {each.cause}" for each in missing)
            raise TaskError(
                f"{counted(len(missing), 'source')} of {len(found)} could not be had: {causes}. What was read is kept in {out}: "
                "run the same command again when the cause is gone, or with --allow-missing to go without"
            )
        domains = {each.domain for each in found if each.kept is not None}
        if len(domains) < 2:
            raise TaskError(f"{out}: {counted(len(domains), 'domain')} could be prepared, at least 2 are needed; {missing[0].cause}")
        write_text(out / CARD, card(task, found))
        where = out / f"{task.name}.yaml"
        write_text(where, _task_file(task, found))
    return where, found


def card(task: Task, found: list[Prepared]) -> str:
    """What a prepared folder holds, as Markdown: source, revision, licence, counts, rows left out, and what may not be passed on."""
    lines = [f"# Task {task.name}, version {task.version}: a prepared copy", ""]
    lines += [task.description, ""] if task.description else []
    lines += [f"Use it with `--tasks` and this folder, or {task.name}.yaml in it; nothing is downloaded then.", ""]
    lines += ["| Domain | Source | From | Revision | Licence | Texts | Rows left out | sha256 |", "|---|---|---|---|---|--:|---|---|"]
    for each in (each for each in found if each.kept is not None):
        assert each.kept is not None
        without = ", ".join(f"{count:,} ({reason})" for reason, count in sorted(each.kept.left_out.items())) or "none"
        cells = (each.domain, each.name, origin(each.part), each.kept.revision or "not known", each.part.licence or NOT_SAID)
        lines.append(f"| {' | '.join(map(_cell, cells))} | {each.kept.documents:,} | {_cell(without)} | `{each.kept.sha256[:16]}` |")
    local = [each for each in found if each.kept is not None and (each.part.local_only or each.part.licence is None)]
    if local:
        names = ", ".join(f"{each.domain}/{each.name}" for each in local)
        lines += ["", f"**For use on your own machines only: do not pass on {names}** (not allowed, asked not to, or no licence stated)."]
    lines += ["", "The other texts may be passed on under their licences only, with their notices; NC forbids commercial use."]
    if missing := [each for each in found if each.kept is None]:
        lines += ["", "## Missing", "", "Scores are those of the texts above and not those of the whole task. It was prepared without:", ""]
        lines += [f"* {each.domain}/{each.name}: {_cell(each.cause)}" for each in missing]
        if gone := sorted({each.domain for each in missing} - {each.domain for each in found if each.kept is not None}):
            lines += ["", f"Domains left out: {', '.join(gone)}."]
    return "\n".join(lines) + "\n"


def origin(part: OneSource) -> str:
    """Where a source is read from, in a few words."""
    if isinstance(part, DatasetSource):
        named = " ".join([part.dataset, *([part.config] if part.config else []), part.split])
        return f"{named} ({part.data_files})" if part.data_files else named
    return part.origin or (", ".join(part.files) if isinstance(part, FileSource) else "texts in the task file")


def _source(task: Task, out: Path, domain: str, name: str, part: OneSource) -> Prepared:
    """One source: as it is there, or read and written."""
    file = f"data/{domain}/{name}.jsonl"
    done = Prepared(domain=domain, name=name, part=part, file=file)
    path, beside = out / file, (out / file).with_suffix(".json")
    try:
        asked = _asked(task, domain, part)
        if path.is_file() and beside.is_file():
            kept = read_versioned(beside, Kept, error=TaskError, hint="remove it and run again")
            if kept.asked == asked and sha256_of(path) == kept.sha256:
                return Prepared(domain=domain, name=name, part=part, file=file, kept=kept, again=True)
        read = read_source(task, domain, part)
        if not read.found:
            raise TaskError(f"no row of it has a text ({dict(read.left_out)})")
    except TaskError as problem:
        return Prepared(domain=domain, name=name, part=part, file=file, cause=str(problem).removeprefix(f"{task.path}: domains.{domain}: "))
    content = "".join(json.dumps(_row(each.document), ensure_ascii=False, allow_nan=False) + "\n" for each in read.found).encode()
    left_out = {reason: count for reason, count in read.left_out.items() if count}
    kept = Kept(
        asked=asked, sha256=hashlib.sha256(content).hexdigest(), revision=read.revision, documents=len(read.found), left_out=left_out
    )
    write_bytes(path, content)
    write_json(beside, kept.model_dump())
    return Prepared(**{**vars(done), "kept": kept})


def _asked(task: Task, domain: str, part: OneSource) -> str:
    """What decides on the texts of a source: its description, and what lies in its local files."""
    from dbes.tasks import local

    told: list[Any] = [domain, part.model_dump(mode="json")]
    if isinstance(part, FileSource):
        told += [[str(path), sha256_of(path)] for name in part.files for path in local.matching(task.path, domain, name)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _row(document: Document) -> dict[str, Any]:
    row = {**vars(document), "choices": list(document.choices) if document.choices else None}
    del row["stand_in"], row["domain"]
    return {key: value for key, value in row.items() if value is not None and value is not False}


def _task_file(task: Task, found: list[Prepared]) -> str:
    domains: dict[str, Any] = {}
    for each in (each for each in found if each.kept is not None):
        assert each.kept is not None
        told = {"source": each.part.source, "licence": each.part.licence, "gated": each.part.gated, "local_only": each.part.local_only}
        at = f" at {each.kept.revision}" if each.kept.revision else ""
        told |= {"origin": origin(each.part) + at, "files": [each.file], "sha256": {each.file: each.kept.sha256}}
        told = {key: value for key, value in told.items() if value}
        if each.part.source is None:  # the only one of its domain; its rows say themselves what they come from
            domains[each.domain] = told
        else:
            domains.setdefault(each.domain, {"sources": []})["sources"].append(told)
    content: dict[str, Any] = {"name": task.name, "version": task.version, "description": task.description, "window": task.window}
    content["domains"] = domains
    if missing := {f"{each.domain}/{each.name}": clipped(each.cause, 300) for each in found if each.kept is None}:
        content["missing"] = missing
    head = f"# Written by `dbes tasks prepare`; sources, revisions and licences are in {CARD}.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)


def _name(part: OneSource, number: int, domain: str, taken: set[str]) -> str:
    """A name for a source within its domain: its own, the data set's, or its place."""
    last = part.dataset.rstrip("/").rpartition("/")[2] if isinstance(part, DatasetSource) else ""
    name = part.source or (last if last.strip(".").isidentifier() else "") or f"source-{number + 1}"
    if f"{domain}/{name}" in taken:
        name = f"{name}-{number + 1}"
    taken.add(f"{domain}/{name}")
    return name


def _told(each: Prepared) -> str:
    if each.kept is None:
        return f"{each.domain}/{each.name}: missing"
    without = f", {sum(each.kept.left_out.values()):,} rows left out" if each.kept.left_out else ""
    return f"{each.domain}/{each.name}: {counted(each.kept.documents, 'text')}{without}{', there already' if each.again else ''}"


def _cell(text: str) -> str:
    """Text from outside in a Markdown table: no column, line or markup of its own."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
