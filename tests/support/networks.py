"""Private networks of sandboxes as the machine shows them: which there are, whose, and what nobody takes down.

Other workers' tests have networks, too, and a subnet that was given back is soon another's: what is
there counts as left behind only while no helper holds the lock of its subnet.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.support.machine import which
from tests.support.waiting import until

STATE = Path("/run/pybuild/net")
_ADDRESS = re.compile(r"\b10\.213\.(\d+)\.(\d+)\b")
_NAME = re.compile(r"\bpybuild_?(\d+)\b")


def subnet_of(address: str) -> int:
    """The number of the subnet that an address lies in."""
    found = _ADDRESS.search(address)
    assert found, address
    return (int(found[1]) << 8 | int(found[2])) >> 2


def holders() -> dict[int, int]:
    """The process that holds each subnet in use."""
    numbers = {}
    with suppress(FileNotFoundError):
        for entry in os.scandir(STATE):
            with suppress(FileNotFoundError):
                numbers[entry.stat().st_ino] = int(entry.name)
    found = {}
    # NUMBER: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE START END; those that wait have an arrow.
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and (number := numbers.get(int(words[5].rpartition(":")[2]))) is not None:
            found[number] = int(words[4])
    return found


def traces() -> dict[str, int]:
    """Each interface and each line of the firewall's rules that belongs to a subnet, with its number."""
    found = {name: int(mine[1]) for _, name in socket.if_nameindex() if (mine := _NAME.fullmatch(name))}
    for command in (["iptables", "-S"], ["iptables", "-t", "nat", "-S"], ["nft", "list", "tables"]):
        if which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in done.stdout.splitlines():
                if mine := _NAME.search(line):
                    found[line] = int(mine[1])
                elif _ADDRESS.search(line):
                    found[line] = subnet_of(line)
    return found


def left_behind() -> dict[str, int]:
    """What nobody will take down; a helper that ends at this moment may still show here."""
    seen = traces()
    held = holders()
    return {line: number for line, number in seen.items() if number not in held}


def networks_of(ancestor: int) -> set[int]:
    """The subnets that descendants of a process hold."""
    return {number for number, pid in holders().items() if _descends(pid, ancestor)}


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            # PID (NAME) STATE PPID …
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def assert_taken_down(before: dict[str, int]) -> None:
    """Nothing is left behind that was not `before`: the end of a sandbox is told before its network is down."""
    until(lambda: left_behind().keys() <= before.keys(), lambda: f"left behind: {left_behind()}")
