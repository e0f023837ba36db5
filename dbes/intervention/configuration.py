"""Settings from the command line and a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbes.errors import InterventionError
from dbes.intervention.settings import Settings
from dbes.paths.selection import check_budget
from dbes.schema import read_yaml, validated
from dbes.text import clipped


def read_configuration(file: Path | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a YAML file (all defaults without one), with those given on the command line on top.

    Raises:
        InterventionError: the file cannot be read, or a setting is unknown or wrong.
        PathError: a budget that is no share.
    """
    content: dict[str, Any] = {}
    if file is not None:
        content = read_yaml(file, error=InterventionError)
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise InterventionError(f"{file}: expected settings by name, got {type(content).__name__}")
    if unnamed := [key for key in content if not isinstance(key, str)]:
        raise InterventionError(f"{file}: {clipped(unnamed[0])}: expected the name of a setting")
    settings = validated(Settings, {**content, **given}, where=file or "settings", error=InterventionError)
    for budget in settings.budgets:
        check_budget(budget)
    return settings
