"""Commands that a reader can paste into a shell: the one that makes a result again, and how dbes is started here."""

from __future__ import annotations

import shlex
import shutil
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbes.text import HIDDEN, printable

if TYPE_CHECKING:
    from dbes.results import Result


def program(*, shared: bool = False) -> str:
    """How dbes is started again from this shell: ``dbes``, its path, or ``python -m dbes.cli``; quoted.

    Args:
        shared: for a page that others read too: a path of this machine only is left out, then it is ``dbes``.
    """
    started = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    interpreter, module = Path(sys.executable), ["-m", "dbes.cli"]
    if started.stem == "dbes" and started.is_file():
        words = [_place(started)]
    else:
        # also after `python -m dbes.cli`: launchers of several processes start interpreters by other names
        script = interpreter.with_name("dbes")
        words = [_place(script)] if script.is_file() else [_place(interpreter), *module]
    return "dbes" if shared and Path(words[0]).is_absolute() else shell(words)


def _place(file: Path) -> str:
    """The file's name where the shell finds it by its name, its path from here where it lies below, else its whole path."""
    found = shutil.which(file.name)
    # the folders are compared, not the files: the python of every environment is a link to one and the same
    if found is not None and Path(found).parent.resolve() == file.absolute().parent.resolve():
        return file.name
    whole = file.absolute()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)


def shell(words: Iterable[object]) -> str:
    """Words as a POSIX shell reads them back; characters that a terminal would obey are written as escapes (bash and zsh read these)."""
    return " ".join(_word(str(word)) for word in words)


def _word(word: str) -> str:
    if not any(unicodedata.category(character) in HIDDEN for character in word):
        return shlex.quote(word)
    return "$'" + "".join(printable(part) if part not in "'\\" else f"\\{part}" for part in word) + "'"


def command(result: Result, *, start: str = "dbes") -> str:
    """The command that makes the result again: the model, task and options that were given, where the result says them.

    Args:
        start: how dbes is started, see `program`.
    """
    settings = result.settings
    if "batch_size" not in settings and result.status == "ok":
        return f"{start} {shell(_score(result))}"
    if "model" in settings and settings["model"] is None:
        return f"# the model was built in Python: dbes.evaluate(model, tasks={settings.get('tasks', result.task.name)!r}, ...)"
    return f"{start} {shell(_evaluate(result))}"


def _score(result: Result) -> list[str]:
    settings, name = result.settings, result.model.name
    words = ["score", str(settings.get("trace") or "TRACE")]
    words += ["--router", name.removesuffix(" router")] if name.endswith(" router") else []
    for name, usual in (("phase", "all"), ("match", "none"), ("surrogate", "token")):
        words += [f"--{name}", str(settings[name])] if settings.get(name, usual) != usual else []
    words += ["--drop-loops"] if settings.get("drop_loops") is True else []
    return words + _asked(result)


def _evaluate(result: Result) -> list[str]:
    from dbes.evaluation.request import DTYPES  # here, so that the commands' help need not load it

    settings, model, task = result.settings, result.model, result.task
    name = "embedded" if model.name == "dbes-embedded" else model.name
    words = ["evaluate", "--model", str(settings.get("model") or name)]
    revision = model.revision if model.revision and not model.revision.startswith("sha256:") else settings.get("revision")
    words += ["--revision", str(revision)] if revision else []
    words += ["--tasks", str(settings.get("tasks") or task.name)]
    dtype = model.dtype if model.dtype in DTYPES else settings.get("dtype")
    words += ["--dtype", str(dtype)] if dtype else []
    words += ["--device-map", str(settings["device_map"])] if settings.get("device_map") else []
    words += ["--batch-size", str(settings["batch_size"])] if settings.get("batch_size", "auto") != "auto" else []
    words += ["--engine", str(settings["engine"])] if settings.get("engine", "auto") != "auto" else []
    words += ["--max-memory", str(settings["max_memory"])] if settings.get("max_memory") else []
    words += ["--name", str(settings["name"])] if settings.get("name") else []
    words += ["--base-url", str(settings["base_url"])] if settings.get("base_url") else []
    words += ["--engine-args", str(settings["engine_args"])] if settings.get("engine_args") else []
    words += ["--limit", str(settings["limit"])] if settings.get("limit") is not None else []
    words += _answers(settings)
    words += ["--trust-remote-code"] if settings.get("trust_remote_code") is True else []
    words += [f"--{name}" for name in ("loss", "ablate") if settings.get(name) is True]
    words += {True: ["--accuracy"], "lm-eval": ["--lm-eval"]}.get(settings.get("accuracy", False), [])
    words += ["--embedded-fallback"] if settings.get("embedded_fallback") is True else []
    return words + _asked(result)


def _asked(result: Result) -> list[str]:
    own = [word for name, each in result.own_metrics.items() for word in ("--metric", each.place or f"FILE.py:{name}")]
    settings = result.settings
    own += ["--strata", ",".join(settings["strata"])] if settings.get("strata") else []
    return own + [word for name in ("seed", "permutations") if name in settings for word in (f"--{name}", str(settings[name]))]


def _answers(settings: dict[str, Any]) -> list[str]:
    about = settings.get("generation")
    if not about:
        return []
    words = ["--generate", str(about.get("tokens"))]
    for name, option, usual in (("temperature", "temperature", 0), ("top_p", "top-p", 1), ("seed", "generation-seed", 0)):
        words += [f"--{option}", str(about[name])] if about.get(name, usual) != usual else []
    words += ["--apply-chat-template"] if settings.get("chat_template") is True else []
    words += ["--system", str(settings["system"])] if settings.get("system") is not None else []
    return words + (["--drop-loops"] if settings.get("drop_loops") is True else [])
