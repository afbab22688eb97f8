"""What this process holds in memory, and has held at most, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def resident(field: str) -> int:
    """Bytes of a field of this process's status: `VmRSS`, now, or `VmHWM`, at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> bool:
    """Let the peak begin anew; whether the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
