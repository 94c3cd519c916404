"""Shells: in a failed step's sandbox (`--on-error=shell`), in its capsule or in an image (`pybuild shell`)."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.capsule import Capsule
    from builder.errors import StepError
    from builder.sandbox.launcher import Running
    from builder.solve.steps import StartAgain

_SHELL = ("/bin/sh", "-i")


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="CAPSULE|IMAGE", help="a file of `build --on-error=capsule`, or an image of the store")
    add("command", nargs="...", metavar="COMMAND", help="this instead of a shell")
    add("--info", action="store_true", help="tell what failed, and open nothing")
    add("--json", action="store_true", help="with --info, as JSON")


def run(verb: str, options: Namespace) -> int:
    from builder import api
    from builder.cli.main import main
    from builder.cli.options import store_root
    from builder.errors import UsageError

    root = store_root(options)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    image = str(options.target)
    file = Path(image)
    capsule = None
    if file.exists() or options.info or image.startswith(("/", ".")) or image.endswith(".tar"):
        capsule = api.read_capsule(file)
        _tell(capsule, as_json=options.info and options.json)
    if options.info:
        return 0
    if options.json:
        raise UsageError("--json goes with --info")
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not command
    flags = ["--rm", "--interactive", *(["--tty"] if terminal else []), "--entrypoint="]
    if capsule is not None:
        image = api.load_capsule(file, root=root)
    try:
        return main(["run", f"--root={root}", *flags, image, *(command or ["/bin/sh"])])
    finally:
        if capsule is not None:
            api.forget_capsule(image, root=root)


def _tell(capsule: Capsule, *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(capsule._asdict(), indent=2))
        return
    where = f"{capsule.file}:{capsule.line}" if capsule.line else capsule.file
    lines = [f"{capsule.step} ({capsule.platform})", f"{where}: {capsule.message}", capsule.instruction]
    if capsule.mounts:
        lines.append("mounts, which are not in the capsule: " + "; ".join(capsule.mounts))
    if capsule.output:
        lines += ["the end of its output:", capsule.output.rstrip("\n")]
    from builder.cli.progress import sanitise

    print("\n".join(sanitise(line) for text in lines for line in text.split("\n")), file=sys.stderr)


def shell(error: StepError, start: StartAgain) -> None:
    """Open the shell and come back when it ends; the build fails all the same."""
    print(f"{error}\n\nA shell in the sandbox of the failed step; the build ends with it.", file=sys.stderr, flush=True)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        running = start(_SHELL[:1], None)
        try:
            running.wait()
        finally:
            running.close()
        return
    rows, columns = termios.tcgetwinsize(0)
    running = start(_SHELL, (rows, columns))
    try:
        _bridge(running)
    finally:
        running.close()


def _bridge(running: Running) -> None:
    """Join our terminal with the sandbox's until the shell has ended."""
    master = running.take_terminal()
    before = termios.tcgetattr(0)

    def resized(_number: int, _frame: object) -> None:
        termios.tcsetwinsize(master, termios.tcgetwinsize(0))

    # Signal handlers are the main thread's; a step runs on another, and then keeps the first size.
    watched = None
    try:
        watched = signal.signal(signal.SIGWINCH, resized)
    except ValueError:
        pass
    try:
        tty.setraw(0)
        while running.poll(0) is None:
            ready, _, _ = select.select([0, master], [], [], 0.2)
            if 0 in ready:
                os.write(master, os.read(0, 4096))
            if master in ready and not _copy(master):
                break
        while select.select([master], [], [], 0)[0] and _copy(master):
            pass
        running.wait()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        if watched is not None:
            signal.signal(signal.SIGWINCH, watched)
        os.close(master)


def _copy(master: int) -> bool:
    """What the sandbox wrote; False at its end, which a terminal tells as EIO."""
    try:
        data = os.read(master, 1 << 16)
    except OSError:
        return False
    os.write(1, data)
    return bool(data)
