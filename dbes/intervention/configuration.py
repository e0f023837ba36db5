"""Settings from the command line and a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dbes.errors import InterventionError
from dbes.intervention.settings import Settings
from dbes.paths.selection import check_budget


def read_configuration(file: Path | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a YAML file (all defaults without one), with those given on the command line on top.

    Raises:
        InterventionError: the file cannot be read, or a setting is unknown or wrong.
        PathError: a budget that is no share.
    """
    content: dict[str, Any] = {}
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text("utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
            raise InterventionError(f"{file}: cannot be read as YAML ({problem})") from None
        if not isinstance(content, dict):
            raise InterventionError(f"{file}: expected settings by name, got {type(content).__name__}")
    try:
        settings = Settings.model_validate({**content, **given})
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InterventionError(f"{file or 'settings'}: {f'{place}: ' if place else ''}{first['msg']}") from None
    for budget in settings.budgets:
        check_budget(budget)
    return settings
