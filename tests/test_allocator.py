"""keep_freed_memory: a process does not give back what it frees."""

import subprocess
import sys

PROGRAM = """
import sys
from pathlib import Path
from sepdist.allocator import keep_freed_memory

def resident_megabytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident_megabytes()
block = bytearray(200 << 20)
block[::4096] = bytes(len(block[::4096]))
del block
print(resident_megabytes() - before)
"""


def grown(*arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_freed_memory_stays_in_a_process_that_keeps_it() -> None:
    assert grown("keep") > 190


def test_without_it_a_large_block_goes_back_to_the_system() -> None:
    assert grown("default") < 10
