"""Memory and processors as control groups leave them, on made-up /proc and /sys trees."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from streamrepair.engine.limits import (
    GROUP,
    RAM_SHARE,
    System,
    allow_open_files,
    default_ram_bytes,
    default_workers,
    whose_is_free,
)
from streamrepair.engine.limits import (
    MACHINE as THE_MACHINE,
)
from streamrepair.errors import StreamRepairError

MACHINE = 64_000_000_000
V1_UNLIMITED = "9223372036854771712\n"


def _system(tmp_path: Path, membership: str, files: dict[str, str]) -> System:
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return System(tmp_path / "membership", tmp_path / "groups")


def _ram(system: System) -> int:
    return default_ram_bytes(system, available_bytes=MACHINE)


def _share(nbytes: int) -> int:
    return int(RAM_SHARE * nbytes)


@pytest.mark.parametrize("membership", ["0::/\n", "", "0::/gone/away\n", "nonsense\n"])
def test_without_limits_it_is_a_share_of_what_the_machine_has(tmp_path: Path, membership: str) -> None:
    system = _system(tmp_path, membership, {"memory.stat": ""})
    assert _ram(system) == _share(MACHINE)
    assert default_workers(system, processors=16) == 16


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert _ram(System(tmp_path / "none", tmp_path / "none")) == _share(MACHINE)


def test_version_2_counts_the_limit_less_what_is_used(tmp_path: Path) -> None:
    files = {"job/memory.max": "16000000000\n", "job/memory.current": "3000000000\n"}
    assert _ram(_system(tmp_path, "0::/job\n", files)) == _share(13_000_000_000)


def test_file_pages_of_the_group_are_not_used_memory(tmp_path: Path) -> None:
    """A container that has read a checkpoint once is full of its pages, which the kernel drops on demand."""
    stat = "anon 1000000000\nfile 14500000000\ninactive_file 10000000000\nactive_file 4000000000\nshmem 500000000\n"
    files = {"memory.max": "16000000000", "memory.current": "15900000000", "memory.stat": stat}
    assert _ram(_system(tmp_path, "0::/\n", files)) == _share(14_100_000_000)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    """SLURM limits the job, not the step in it; a group above may have less left than its own limit says."""
    files = {
        "slurm/memory.max": "max",
        "slurm/memory.current": "40000000000",
        "slurm/job_1/memory.max": "20000000000",
        "slurm/job_1/memory.current": "12000000000",
        "slurm/job_1/step_0/memory.max": "18000000000",
        "slurm/job_1/step_0/memory.current": "1000000000",
    }
    assert _ram(_system(tmp_path, "0::/slurm/job_1/step_0\n", files)) == _share(8_000_000_000)


def test_memory_high_counts_as_a_limit(tmp_path: Path) -> None:
    """Above it the kernel throttles a process until it stands still."""
    files = {"a/memory.max": "16000000000", "a/memory.high": "9000000000", "a/memory.current": "0"}
    assert _ram(_system(tmp_path, "0::/a\n", files)) == _share(9_000_000_000)


def test_version_1(tmp_path: Path) -> None:
    stat = "cache 5\ninactive_file 1\ntotal_inactive_file 2000000000\ntotal_active_file 1000000000\n"
    files = {
        "memory/docker/c0/memory.limit_in_bytes": "8000000000",
        "memory/docker/c0/memory.usage_in_bytes": "5000000000",
        "memory/docker/c0/memory.stat": stat,
        "memory/docker/memory.limit_in_bytes": V1_UNLIMITED,
        "memory/docker/memory.usage_in_bytes": "5000000000",
        "memory/memory.limit_in_bytes": V1_UNLIMITED,
        "memory/memory.usage_in_bytes": "50000000000",
    }
    membership = "12:pids:/docker/c0\n6:memory:/docker/c0\n1:name=systemd:/docker/c0\n"
    assert _ram(_system(tmp_path, membership, files)) == _share(6_000_000_000)


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """The host's path of version 1 is not mounted in a container, the group itself is, at the root."""
    files = {"memory/memory.limit_in_bytes": "4000000000", "memory/memory.usage_in_bytes": "1000000000"}
    assert _ram(_system(tmp_path, "6:memory:/kubepods/pod1/c0\n", files)) == _share(3_000_000_000)
    files = {"memory.max": "2000000000", "memory.current": "500000000"}
    assert _ram(_system(tmp_path, "0::/../other\n", files)) == _share(1_500_000_000)


def test_hybrid_machines_are_asked_both_ways(tmp_path: Path) -> None:
    files = {
        "unified/a/memory.max": "9000000000",
        "unified/a/memory.current": "0",
        "memory/b/memory.limit_in_bytes": "7000000000",
        "memory/b/memory.usage_in_bytes": "0",
    }
    assert _ram(_system(tmp_path, "0::/a\n4:memory:/b\n", files)) == _share(7_000_000_000)


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert _ram(_system(tmp_path, "0::/a\n", {"a/memory.max": "1000", "a/memory.current": "2000"})) == 0


@pytest.mark.parametrize(
    ("membership", "files", "workers"),
    [
        ("0::/a\n", {"a/cpu.max": "max 100000"}, 16),
        ("0::/a\n", {"a/cpu.max": "250000 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "800000 100000"}, 2),
        ("0::/a\n", {"a/cpu.max": "10000 100000"}, 1),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "5"}, 16),
    ],
)
def test_workers_by_the_share_of_processor_time(
    tmp_path: Path, membership: str, files: dict[str, str], workers: int
) -> None:
    assert default_workers(_system(tmp_path, membership, files), processors=16) == workers


def test_on_this_machine_it_is_no_more_than_is_free() -> None:
    assert 0 < default_ram_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


def test_who_has_least_free_is_told(tmp_path: Path) -> None:
    files = {"job/memory.max": "16000000000\n", "job/memory.current": "3000000000\n"}
    system = _system(tmp_path, "0::/job\n", files)
    assert whose_is_free(system, available_bytes=13_000_000_001) == GROUP
    assert whose_is_free(system, available_bytes=12_999_999_999) == THE_MACHINE


def test_as_many_files_as_a_run_holds_are_held_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft limit is raised first; what is open above a limit that was set later takes none of its numbers."""
    soft = 100
    limits = [soft, soft]
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, new: limits.__setitem__(slice(None), new))
    opened = sum(int(name) < soft for name in os.listdir("/proc/self/fd")) - 1  # noqa: PTH208
    allow_open_files(soft - opened - 5)
    with pytest.raises(
        StreamRepairError, match=r"may have 100 files open, .* needs 101: raise the limit .* \(ulimit -n\)"
    ):
        allow_open_files(soft - opened - 4)
    limits[:] = [soft, 200]
    allow_open_files(soft - opened - 4)
    assert limits == [200, 200]
