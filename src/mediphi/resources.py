"""Cores and main memory that this process may use, with the limits of its control groups."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def num_cores() -> int:
    """Cores that this process may use: its affinity, and a container's or job's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for group in _groups():
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            count = min(count or 1, -(-int(quota) // int(period)))
    return max(1, count or 1)


def free_memory() -> int:
    """Bytes of main memory that can still be had: the machine's, and a container's or job's."""
    lines = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in lines:
        free = lines["MemAvailable"] * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _groups():
        limit, used = (_read(group / f"memory.{name}").strip() for name in ("max", "current"))
        if limit.isdigit() and used.isdigit():
            cached = _numbers(group / "memory.stat").get("inactive_file", 0)  # given back on demand
            free = min(free, int(limit) - int(used) + cached)
    return max(0, free)


def _groups() -> Iterator[Path]:
    """This process's control group and those around it; inside a container the outermost alone."""
    own = _read(OWN_GROUP).partition("0::/")[2].strip()
    group = CGROUP / own
    while group != CGROUP and CGROUP in group.parents:
        yield group
        group = group.parent
    yield CGROUP


def _numbers(path: Path) -> dict[str, int]:
    """Names and first numbers of lines such as `MemFree: 12 kB`."""
    words = (line.replace(":", " ").split() for line in _read(path).splitlines())
    return {found[0]: int(found[1]) for found in words if len(found) > 1 and found[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
