"""Load a checkpoint for recording, or say plainly why it cannot be loaded. With `dbes.sites` the only code that knows transformers."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import Mxfp4Config

from dbes.errors import ModelError
from dbes.sites import RoutingSite, base_of, find_sites, input_device, is_offloaded, max_positions

__all__ = [
    "LoadedModel",
    "RoutingSite",
    "base_of",
    "find_sites",
    "input_device",
    "is_offloaded",
    "load_config",
    "load_model",
    "load_weights",
    "max_positions",
]

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "tokenization_*.py")
WHOLE_FILE = 64 * 2**20
EDGE = 2**20


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to record, and what identifies it.

    Attributes:
        name: hub id, name of the folder, or class of a model built in memory.
        revision: commit of the hub repository, or ``sha256:...`` of a folder's config and weights (`folder_fingerprint`),
            or of the weights of a model in memory.
        tokenizer_sha256: of everything that turns text into ids.
        dtype, attention, experts_implementation, device: how it computes; all of them can flip close choices.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str
    parameters: int
    config: dict[str, Any]
    tokenizer_sha256: str
    dtype: str
    attention: str
    experts_implementation: str
    device: str


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The checkpoint in a folder or on the Hugging Face hub, in eval mode; or a model that is already built, with its tokenizer.

    Args:
        revision: branch, tag or commit on the hub.
        dtype: "auto" is float32 on a CPU, where bfloat16 is slow and changes the experts of 2-3 % of tokens with the shape of
            the batch, and the checkpoint's own dtype on an accelerator. Or a name such as "bfloat16".
        device_map: as in transformers; by default the accelerator when there is one.
        trust_remote_code: run model code that comes with the checkpoint. Off by default. Pickled weights are never loaded.

    Raises:
        ModelError: the folder lacks config, tokenizer or weights; weights are corrupt, truncated or incomplete; the hub cannot
            be reached; the model needs its own code; it is not a Mixture-of-Experts model.
    """
    if not isinstance(model, str | Path):
        if tokenizer is None:
            raise ModelError("a model built in memory needs its tokenizer: load_model(model, tokenizer=...)")
        given = name or model.config.name_or_path or type(model).__name__
        given = Path(given).name if Path(given).exists() else given
        return _described(model.eval(), tokenizer, name=given, revision=_model_fingerprint(model))

    where = str(model)
    folder = Path(where) if Path(where).is_dir() else None
    if folder is None and (where.startswith((".", "/", "~")) or where.count("/") > 1 or isinstance(model, Path)):
        raise ModelError(f"{where}: no such folder; give a checkpoint folder or a hub id (organization/name)")
    if folder is not None:
        check_folder(folder, trust_remote_code=trust_remote_code)
    loaded = load_weights(where, revision=revision, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        with _explained(where, part="tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    assert tokenizer is not None
    commit = folder_fingerprint(folder) if folder is not None else getattr(loaded.config, "_commit_hash", None) or revision or "unknown"
    return _described(loaded, tokenizer, name=name or (folder.resolve().name if folder is not None else where), revision=commit)


def load_weights(
    where: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint alone, in eval mode; arguments and errors as of `load_model`."""
    config = load_config(where, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_dense(config, trust_remote_code=trust_remote_code)
    accelerated = torch.accelerator.is_available()
    options: dict[str, Any] = {
        "dtype": _dtype(dtype, accelerated),
        "device_map": device_map if device_map is not None else "auto" if accelerated else None,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "revision": revision,
    }
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
        # mxfp4 kernels bypass the modules whose routing is read
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    with _explained(where):
        answer: Any = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    loaded, report = answer
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} tensors are not in the weights (first: {missing[0]}), they would be random; "
            "the checkpoint is incomplete or belongs to another config.json"
        )
    return loaded.eval()


def load_config(where: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint folder or hub repository.

    Raises:
        ModelError: there is none, it cannot be read, it needs its own code, or the hub cannot be reached.
    """
    with _explained(where, part="config.json"):
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)


def folder_fingerprint(folder: Path) -> str:
    """``sha256:`` over config.json and the weights of a folder.

    Weight files up to 64 MiB are hashed whole; of larger ones the header (names, shapes, offsets), the size and the first and
    last MiB, because reading hundreds of GB would take longer than recording. It tells checkpoints apart; it is no proof
    against someone who alters a few numbers in the middle of a file.
    """
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as content:
            if size <= WHOLE_FILE or path.suffix == ".json":
                digest.update(content.read())
                continue
            (header,) = struct.unpack("<Q", content.read(8))
            digest.update(content.read(header + EDGE))
            content.seek(-EDGE, 2)
            digest.update(content.read())
    return f"sha256:{digest.hexdigest()}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what turns text into ids: the whole Rust tokenizer, or class and vocabulary of a Python one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _model_fingerprint(model: PreTrainedModel) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().flatten()
            for part in (flat[:4096], flat[-4096:]):
                digest.update(part.float().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _described(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, revision: str) -> LoadedModel:
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        config=json.loads(json.dumps(model.config.to_dict(), default=str)),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(model.config, "_attn_implementation", None)),
        experts_implementation=str(getattr(model.config, "_experts_implementation", None)),
        device=input_device(model).type,
    )


def _dtype(dtype: str, accelerated: bool) -> torch.dtype | str:
    if dtype == "auto":
        return "auto" if accelerated else torch.float32
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    return chosen


def check_folder(folder: Path, *, trust_remote_code: bool) -> None:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{folder}: no config.json here, so this is not a checkpoint folder")
    try:
        config = json.loads(config_path.read_text("utf-8"))
    except ValueError as problem:
        raise ModelError(f"{config_path}: cannot be read as JSON ({problem})") from None
    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(_needs_code(str(folder)))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = next((path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")), None)
        hint = f"; {pickled} is a pickle and is not loaded: convert it to safetensors" if pickled else ""
        raise ModelError(f"{folder}: no *.safetensors here, so the folder has no weights{hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        for lost in sorted(named - {path.name for path in weights}):
            raise ModelError(f"{folder / lost}: this part of the weights is missing (model.safetensors.index.json names it); copy it again")
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as problem:
            raise ModelError(f"{path}: corrupt or truncated safetensors ({problem}); copy or download it again") from None
    if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise ModelError(f"{folder}: no tokenizer here (expected tokenizer.json or a vocabulary); save the model's tokenizer here")


def _refuse_dense(config: Any, *, trust_remote_code: bool) -> None:
    """Find the sites on a model without weights, before hundreds of GB are downloaded for a model that has none."""
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception:
        return  # some models cannot be built without memory; they are checked once loaded
    find_sites(skeleton)


def _needs_code(where: str) -> str:
    return (
        f"{where}: this model comes with its own Python code, which dbes does not run unless you say so; "
        "read that code, then pass trust_remote_code=True (--trust-remote-code)"
    )


class _explained:
    """Turns what transformers and the hub raise into a ModelError that says what to do."""

    def __init__(self, where: str, *, part: str = "model") -> None:
        self.where, self.part = where, part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, problem: BaseException | None, _: Any) -> None:
        if problem is None or isinstance(problem, ModelError) or not isinstance(problem, Exception):
            return
        text = str(problem)
        first = text.strip().splitlines()[0] if text.strip() else type(problem).__name__
        if "trust_remote_code" in text:
            raise ModelError(_needs_code(self.where)) from None
        if "connect" in text.lower() or "offline" in text.lower() or isinstance(problem, ConnectionError):
            raise ModelError(
                f"{self.where}: the Hugging Face hub cannot be reached and this {self.part} is not in the local cache; "
                "check the connection, or give a folder"
            ) from None
        if "does not appear to have a file named" in text or "safetensors" in text.lower():
            raise ModelError(f"{self.where}: no usable {self.part} ({first}); dbes reads safetensors only") from None
        if "not a valid model identifier" in text or "404" in text or "401" in text or "gated" in text.lower():
            raise ModelError(f"{self.where}: neither a folder nor a repository you can read on the Hugging Face hub ({first})") from None
        if "does not recognize this architecture" in text or "Unrecognized model" in text:
            raise ModelError(f"{self.where}: transformers {transformers.__version__} does not know this architecture ({first})") from None
        raise ModelError(f"{self.where}: the {self.part} cannot be loaded ({type(problem).__name__}: {first})") from problem
