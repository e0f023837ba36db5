"""How much memory this process may still take: the least of what the machine, its control groups and its own limit leave.

A container is told the memory of its host, and is killed without a word when it passes the limit of its control group. So the
limits of the group and of every group above it are read, of both versions of control groups.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

NO_LIMIT = 2**62
"""Version 1 writes a number near 2 ** 63 where a group has no limit."""


@dataclass(frozen=True)
class Available:
    """Memory that can still be taken, in bytes, and what it is limited by, in words that follow "by"."""

    bytes: int
    limit: str


def available_memory(root: Path = Path("/"), *, mapped: int = 0) -> Available:
    """The least that the machine, the control groups and ``ulimit -v`` leave to this process; never below 0.

    Args:
        root: where /proc and /sys/fs/cgroup are looked for.
        mapped: bytes of files that will be mapped: they take address space, which ``ulimit -v`` limits, and no memory.
    """
    found = [Available(psutil.virtual_memory().available, "the memory of this machine"), *group_memory(root)]
    if (space := address_space()) is not None:
        found.append(Available(max(0, space - mapped), "the limit of address space of this process (ulimit -v)"))
    return min(found, key=lambda each: each.bytes)


def device_memory(device: torch.device) -> Available | None:
    """Free memory of an accelerator; None where torch cannot tell."""
    with suppress(AttributeError, RuntimeError, NotImplementedError):
        return Available(int(torch.accelerator.get_memory_info(device)[0]), f"the memory of {device}")
    return None


def group_memory(root: Path = Path("/")) -> tuple[Available, ...]:
    """What every control group of this process with a limit leaves, the process's own group first.

    Pages of files that are not in use count as free: the kernel drops them before it refuses memory.
    """
    found = []
    for folder, names in _groups(root):
        limits = [limit for name in names.limits if (limit := _number(folder / name)) is not None and limit < NO_LIMIT]
        used = _number(folder / names.usage)
        if limits and used is not None:
            held = used - min(used, _statistic(folder / "memory.stat", names.inactive))
            where = "/" + folder.relative_to(root).as_posix()
            found.append(Available(max(0, min(limits) - held), f"the limit of the control group {where}"))
    return tuple(found)


def address_space() -> int | None:
    """Bytes of address space left below ``ulimit -v``; None where there is no such limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


@dataclass(frozen=True)
class _Names:
    """Files of a group: limits, usage, and the line of memory.stat that counts file pages not in use, children included."""

    limits: tuple[str, ...]
    usage: str
    inactive: str


VERSION_1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
# above memory.high a group is not killed but slowed until it hardly moves
VERSION_2 = _Names(("memory.max", "memory.high"), "memory.current", "inactive_file")


def _groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """The folders of this process's memory groups, from its own up to where they are mounted."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        groups["cgroup2" if not controllers else "cgroup" if "memory" in controllers.split(",") else ""] = group
    for kind, mount, point in _mounts(root):
        if kind not in groups:
            continue
        top, group = root / point.lstrip("/"), PurePosixPath(groups[kind])
        # a container may see only the part of the tree from its own group on, or be told a group outside of it
        seen = group.is_relative_to(mount) and ".." not in group.parts
        folder = top / group.relative_to(mount) if seen else top
        for each in (folder, *folder.parents):
            if each.is_relative_to(top):
                yield each, VERSION_2 if kind == "cgroup2" else VERSION_1


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """(kind, the group at its top, folder) of every mounted tree of control groups that limits memory."""
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, kind = line.partition(" - ")
        before, after = place.split(" "), kind.split(" ")
        if after[0] == "cgroup2" or (after[0] == "cgroup" and "memory" in after[-1].split(",")):
            yield after[0], before[3], before[4]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or it says ``max``."""
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    return next((int(value) for line in _lines(path) for key, _, value in [line.partition(" ")] if key == name and value.isdigit()), 0)
