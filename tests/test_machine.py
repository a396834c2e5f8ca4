"""What is said of the machine."""

from pathlib import Path

import psutil
import pytest

from laptop import machine


def test_the_limit_of_a_container_counts_but_its_page_cache_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000})
    )
    assert machine.available_memory_bytes() == 1_000_000, "no container"
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4500\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nactive_file 3000\ninactive_file 500\n")
    assert machine.available_memory_bytes() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory_bytes() == 1_000_000
