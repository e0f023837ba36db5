"""Memory that is left: fake trees of both versions of control groups, a real group where one can be made, and ulimit."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dbes.models.memory import available_memory, group_memory

GiB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "ascii")
    return root


def version_2(root: Path, groups: dict[str, dict[str, str]], *, own: str, mount: str = "/") -> Path:
    files = {f"sys/fs/cgroup{group}/{name}": text for group, values in groups.items() for name, text in values.items()}
    files["proc/self/cgroup"] = f"0::{own}\n"
    files["proc/self/mountinfo"] = f"31 23 0:28 {mount} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    return tree(root, files)


def test_version_2_takes_limit_less_usage_and_counts_idle_file_pages_as_free(tmp_path: Path) -> None:
    pages = f"anon 9\ninactive_file {2 * GiB}\nactive_file 7\n"
    group = {"memory.max": f"{8 * GiB}\n", "memory.current": f"{5 * GiB}\n", "memory.stat": pages}
    found = group_memory(version_2(tmp_path, {"/job": group}, own="/job"))
    assert [each.bytes for each in found] == [5 * GiB]
    assert found[0].limit == "the limit of the control group /sys/fs/cgroup/job"


def test_the_tightest_ancestor_counts_and_groups_without_a_limit_do_not(tmp_path: Path) -> None:
    groups = {
        "/a/b/c": {"memory.max": "max\n", "memory.current": "1\n"},
        "/a/b": {"memory.max": str(4 * GiB), "memory.current": str(GiB)},
        "/a": {"memory.max": "max", "memory.high": str(2 * GiB), "memory.current": str(GiB)},
    }
    root = version_2(tmp_path, groups, own="/a/b/c")
    assert [each.bytes for each in group_memory(root)] == [3 * GiB, GiB]
    least = available_memory(root)
    assert least.bytes <= GiB and (least.bytes < GiB or "/sys/fs/cgroup/a" in least.limit)


@pytest.mark.parametrize(
    ("own", "mount"),
    [
        pytest.param("/", "/", id="a namespace of its own"),
        pytest.param("/docker/123", "/docker/123", id="the mount begins at the group"),
        pytest.param("/docker/123", "/elsewhere", id="the group is outside of what is mounted"),
        pytest.param("/../../host", "/", id="the group is above the namespace"),
    ],
)
def test_in_a_container_the_mounted_group_is_read(tmp_path: Path, own: str, mount: str) -> None:
    root = version_2(tmp_path, {"": {"memory.max": str(GiB), "memory.current": "0"}}, own=own, mount=mount)
    assert [each.bytes for each in group_memory(root)] == [GiB]


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    below = "sys/fs/cgroup/memory"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/x/y\n0::/\n",
            "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            f"{below}/x/y/memory.limit_in_bytes": "9223372036854771712",
            f"{below}/x/y/memory.usage_in_bytes": "5",
            f"{below}/x/memory.limit_in_bytes": str(3 * GiB),
            f"{below}/x/memory.usage_in_bytes": str(2 * GiB),
            f"{below}/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {GiB}\n",
        },
    )
    assert [each.bytes for each in group_memory(root)] == [2 * GiB]


def test_more_used_than_allowed_is_nothing_left_and_no_groups_are_no_limit(tmp_path: Path) -> None:
    root = version_2(tmp_path / "full", {"": {"memory.max": str(GiB), "memory.current": str(2 * GiB)}}, own="/")
    assert available_memory(root).bytes == 0
    assert group_memory(tmp_path) == ()
    assert available_memory(tmp_path).limit == "the memory of this machine"


LEFT = "from dbes.models.memory import available_memory as a; found = a(mapped={mapped}); print(found.bytes); print(found.limit)"


def test_a_real_control_group_limits() -> None:
    own = next((line for line in Path("/proc/self/cgroup").read_text("ascii").splitlines() if ":memory:" in line), None)
    parent = Path("/sys/fs/cgroup/memory") if own else Path("/sys/fs/cgroup")
    group = parent / f"dbes-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as problem:
        pytest.skip(f"no control group can be made here: {problem}")
    try:
        limit = group / ("memory.limit_in_bytes" if own else "memory.max")
        if not limit.exists():
            pytest.skip("the memory controller is not given to groups here")
        limit.write_text(str(GiB))
        enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
        done = subprocess.run([sys.executable, "-c", enter + LEFT.format(mapped=0)], capture_output=True, text=True, check=True)
        left, by = done.stdout.splitlines()
        # importing torch has taken some of it
        assert 0 < int(left) < GiB and group.name in by
    finally:
        with suppress(OSError):
            group.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by Linux")
def test_ulimit_counts_what_is_mapped() -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({16 * GiB}, {16 * GiB})); "
    runs = [
        subprocess.run([sys.executable, "-c", limit + LEFT.format(mapped=mapped)], capture_output=True, text=True, check=True)
        for mapped in (15 * GiB, 17 * GiB)
    ]
    assert all("ulimit -v" in run.stdout for run in runs)
    some, none = (int(run.stdout.splitlines()[0]) for run in runs)
    assert 0 <= some < GiB and none == 0
