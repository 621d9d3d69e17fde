"""keep_freed_memory: a process keeps freed memory up to the limit and returns the rest."""

import subprocess
import sys

import pytest

from sepdist import allocator

PROGRAM = """
import sys
from pathlib import Path
from sepdist.allocator import MIB, keep_freed_memory

def resident_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024

limit_mib, *block_mib = map(int, sys.argv[1:])
if limit_mib:
    keep_freed_memory(limit_mib * MIB)
before = resident_mib()
blocks = [bytearray(size * MIB) for size in block_mib]
for block in blocks:
    block[::4096] = bytes(len(block[::4096]))
held = resident_mib() - before
del block
while blocks:
    blocks.pop()
print(held, resident_mib() - before)
"""


@pytest.mark.parametrize(
    ("limit_mib", "block_mib", "left_mib"),
    [
        (0, [100], 0),  # glibc's defaults
        (256, [200], 200),
        (256, [100, 100], 200),
        (128, [100, 100, 100], 128),
        (128, [200], 0),
    ],
)
def test_freed_memory_up_to_the_limit_stays_and_the_rest_goes_back(
    limit_mib: int, block_mib: list[int], left_mib: int
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(limit_mib), *map(str, block_mib)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held, left = map(float, output.split())
    assert held == pytest.approx(sum(block_mib), abs=10)
    assert left == pytest.approx(left_mib, abs=10)


def test_without_mallopt_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory()
