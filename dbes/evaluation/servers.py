"""Servers that return routing: vLLM in this process, and vLLM or SGLang behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import yaml

from dbes.errors import RecordingError, SettingError, SourceError
from dbes.importing import sglang, vllm
from dbes.importing.sizes import ModelSizes
from dbes.importing.types import Document, Notes
from dbes.text import clipped
from dbes.wording import counted

if TYPE_CHECKING:
    from dbes.evaluation.request import Request
    from dbes.models import LoadedModel

SERVED = ("vllm", "openai")
"""Engines that need no weights here."""

AT_ONCE, TRIES, TIMEOUT = 8, 5, 600.0
"""Requests at a time, attempts of each, and seconds that one may take."""

PROBE = "Routing 101: the quick brown fox, naïve café, 東京.\n\tdef f(x): return x"
"""A text that tokenizers cut differently."""

RESUMES = "finished work units are kept, the same command resumes"


def sizes_of(loaded: LoadedModel) -> ModelSizes:
    """Sizes of the model as its config says."""
    from dbes.models.sites import find_sites

    sites, config = find_sites(loaded.model), loaded.model.config.get_text_config()
    return ModelSizes(
        experts=max(site.num_experts for site in sites),
        top_k=max(site.top_k for site in sites),
        hidden_layers=getattr(config, "num_hidden_layers", None),
        moe_layers=tuple(site.layer for site in sites),
        where=f"the config of {loaded.name}",
    )


def connect(request: Request, loaded: LoadedModel) -> VllmServer | HttpServer:
    """The server that a request names.

    Raises:
        SettingError: it is not installed, or what identifies it is missing or wrong.
        RecordingError: it cannot be reached, or serves another model or tokenizer.
    """
    if request.engine == "vllm":
        return VllmServer(str(request.model), loaded, arguments_of(request.engine_args))
    assert request.base_url is not None
    key = None if request.api_key_env is None else os.environ.get(request.api_key_env)
    if request.api_key_env is not None and not key:
        raise SettingError(f"api_key_env: the environment has no {request.api_key_env}")
    return HttpServer(request.base_url, loaded, key=key)


def arguments_of(text: str | None) -> dict[str, Any]:
    """``name=value`` pairs, separated by commas; values as YAML has them.

    Raises:
        SettingError: one without a name or a value.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise SettingError(f"engine_args {clipped(part)!r}: expected name=value, several separated by commas")
        found[name.strip()] = yaml.safe_load(value)
    return found


def _rows(document: Document | None, prompt: np.ndarray, *, where: str) -> np.ndarray:
    """The routing of every token of a prompt, [rows, layers, slots], from what a server said."""
    if document is None:
        raise RecordingError(
            f"{where}: no routed_experts in the answer; start vLLM with --enable-return-routed-experts, SGLang with "
            "--enable-return-routed-experts too (an older server, or a Rust front end, never returns them)"
        )
    ids = np.asarray(document.ids)
    ids = ids if document.columns is None else ids[:, list(document.columns)]
    if (document.positions is not None and len(document.positions) and document.positions[0]) or (ids < 0).any():
        raise RecordingError(f"{where}: tokens without routing, since they came from the prefix cache; switch prefix caching off")
    tokens = document.token_ids
    if tokens is not None and not np.array_equal(tokens[: len(prompt)], prompt[: len(tokens)]):
        raise RecordingError(f"{where}: the server read other tokens than it was given; does it serve another model?")
    return ids


class VllmServer:
    """vLLM in this process; prompts are read with one generated token, which has no row."""

    def __init__(self, model: str, loaded: LoadedModel, arguments: Mapping[str, Any]) -> None:
        try:
            import vllm as package  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SettingError("engine 'vllm': vLLM is not installed; pip install 'dbes[vllm]'") from None
        self.sizes, self.notes, self.arguments = sizes_of(loaded), Notes(), dict(arguments)
        self.package: Any = package
        try:
            self.model = package.LLM(model=model, **{"enable_return_routed_experts": True, **arguments})
        except (ValueError, TypeError, RuntimeError) as problem:
            raise SettingError(f"engine 'vllm': {clipped(' '.join(str(problem).split()), 300)}") from problem
        self.sampling = package.SamplingParams(max_tokens=1, temperature=0.0)

    @property
    def identity(self) -> dict[str, Any]:
        return {"engine": "vllm", "version": str(self.package.__version__), "arguments": self.arguments}

    def routed(self, prompts: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[np.ndarray]:
        # a salt of its own for each: what comes from the prefix cache has no routing
        asked = [{"prompt_token_ids": prompt.tolist(), "cache_salt": uuid4().hex} for prompt in prompts]
        answers = self.model.generate(asked, self.sampling, use_tqdm=False)
        if len(answers) != len(prompts):
            raise RecordingError(f"vllm: {counted(len(answers), 'answer')} to {counted(len(prompts), 'prompt')}")
        for answer, prompt, name in zip(answers, prompts, names, strict=True):
            output = answer.outputs[0]
            record: dict[str, Any] = {
                "request_id": str(answer.request_id),
                "prompt_token_ids": list(answer.prompt_token_ids),
                "prompt_routed_experts": getattr(answer, "prompt_routed_experts", None),
                "outputs": [{"token_ids": list(output.token_ids), "routed_experts": getattr(output, "routed_experts", None)}],
            }
            yield _parsed(vllm.of_response, record, prompt, self.sizes, self.notes, where=f"vllm, {name}")


def _parsed(
    parse: Callable[..., Document | None], record: dict[str, Any], prompt: np.ndarray, sizes: ModelSizes, notes: Notes, *, where: str
) -> np.ndarray:
    try:
        return _rows(parse(record, where, sizes, notes), prompt, where=where)
    except SourceError as problem:
        raise RecordingError(str(problem)) from problem


class HttpServer:
    """vLLM or SGLang behind ``/v1/completions``.

    Args:
        url: of the server, with or without ``/v1``.
        key: sent as a bearer token.
        sleep: waits so many seconds between attempts.
    """

    def __init__(self, url: str, loaded: LoadedModel, *, key: str | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        self.root = url.rstrip("/").removesuffix("/v1")
        if not self.root.startswith(("http://", "https://")):
            raise SettingError(f"base_url {clipped(url)!r}: expected http://HOST:PORT")
        self.sizes, self.notes, self.key, self.sleep = sizes_of(loaded), Notes(), key, sleep
        self.kind, self.version = self._kind()
        self.name = self._served(loaded.name)
        self._same_tokenizer(loaded)

    @property
    def identity(self) -> dict[str, Any]:
        return {"engine": f"openai ({self.kind})", "version": self.version, "model": self.name}

    def routed(self, prompts: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(self._routed, prompts, names)

    def _routed(self, prompt: np.ndarray, name: str) -> np.ndarray:
        where = f"{self.root}, {name}"
        body: dict[str, Any] = {"model": self.name, "prompt": prompt.tolist(), "max_tokens": 1, "temperature": 0}
        if self.kind == "sglang":
            # with one token to generate, requests that only read their prompt were seen to lack its last row
            answer = self._ask("/v1/completions", {**body, "max_tokens": 2, "return_routed_experts": True}, where=where)
            answer |= {"input_ids": prompt.tolist()}
            parse = sglang.of_response
        else:
            # a salt of its own for each: what comes from the prefix cache has no routing
            answer = self._ask("/v1/completions", {**body, "return_token_ids": True, "cache_salt": uuid4().hex}, where=where)
            parse = vllm.of_response
        read = (answer.get("usage") or {}).get("prompt_tokens") if isinstance(answer.get("usage"), dict) else None
        if isinstance(read, int) and read != len(prompt):
            raise RecordingError(f"{where}: the server read {read} tokens of {len(prompt)} that it was given")
        return _parsed(parse, answer, prompt, self.sizes, self.notes, where=where)

    def _kind(self) -> tuple[str, str]:
        """vllm or sglang, and its version."""
        for path, kind in (("/version", "vllm"), ("/get_server_info", "sglang")):
            found = self._ask(path, None, where=self.root, absent=True)
            if found is not None and isinstance(found.get("version"), str):
                return kind, clipped(found["version"])
        return "unknown", "unknown"

    def _served(self, wanted: str) -> str:
        """The name under which the model is asked for: the one the server has, or the one of these that is wanted."""
        listed = self._ask("/v1/models", None, where=self.root).get("data")
        each_id = [each.get("id") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        names = [name for name in each_id if isinstance(name, str)]
        if len(names) == 1:
            return names[0]
        if wanted in names:
            return wanted
        raise RecordingError(f"{self.root}: serves {clipped(names)}, and not {wanted!r}")

    def _same_tokenizer(self, loaded: LoadedModel) -> None:
        ours = loaded.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        body = {"model": self.name, "prompt": PROBE, "add_special_tokens": False}
        found = self._ask("/tokenize", body, where=self.root, absent=True)
        theirs = None if found is None else found.get("tokens")
        if isinstance(theirs, list) and theirs != ours:
            raise RecordingError(
                f"{self.root}: serves {self.name!r} with another tokenizer than that of {loaded.name!r}; give the --model that it serves"
            )

    def _ask(self, path: str, body: dict[str, Any] | None, *, where: str, absent: bool = False) -> Any:
        """The JSON object that the server answers; None where it has no such path and may lack it.

        Raises:
            RecordingError: it refuses, or does not answer after TRIES attempts.
        """
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                self.sleep(2.0 ** (attempt - 1))
            try:
                return self._answer(path, body)
            except urllib.error.HTTPError as refused:
                said = clipped(" ".join(refused.read(4096).decode("utf-8", "replace").split()), 300)
                problem = f"{refused.code} {refused.reason}: {said}"
                if refused.code < 500 and refused.code not in (408, 429):
                    if absent and refused.code in (404, 405):
                        return None
                    raise RecordingError(f"{where}: the server refuses {path} ({problem})") from None
            except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as broken:
                problem = clipped(str(getattr(broken, "reason", broken)) or type(broken).__name__, 300)
        raise RecordingError(f"{where}: {path} failed {TRIES} times ({problem}); {RESUMES}")

    def _answer(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({} if self.key is None else {"Authorization": f"Bearer {self.key}"})
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.root + path, data=data, headers=headers), timeout=TIMEOUT) as answer:
            found = json.loads(answer.read())
        if not isinstance(found, dict):
            raise ValueError("the answer is no JSON object")
        return found
