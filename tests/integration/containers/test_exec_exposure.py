"""What enters a container is out of the container's reach, for as long as it is the host's interpreter."""

from __future__ import annotations

from tests.integration.containers.boxes import IMAGE, box, start
from tests.support.cli import Pybuild

__all__ = ["box"]

WATCH = """
while :; do
  for p in /proc/[0-9]*; do
    exe=$(readlink $p/exe 2>/dev/null) && case $exe in
      /bin/busybox*|/memfd:*) ;;
      *) echo "seen: $exe" ;;
    esac
    (head -c 1 $p/environ | grep -q . && grep -l PYTHON $p/environ) 2>/dev/null | sed 's/^/seen: /'
  done
done
"""


def test_exec_shows_nothing_of_the_host(box: Pybuild) -> None:
    start(box, "--name", "watcher", IMAGE, "sh", "-c", WATCH)
    for _ in range(5):
        assert box.run("exec", "watcher", "echo", "inside").text == "inside\n"
    result = box.run("exec", "watcher", "/proc/self/exe", check=False)
    assert result.status == 126 and "Too many levels" in result.stderr
    assert "seen" not in box.run("logs", "watcher").text
