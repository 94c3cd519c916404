"""The process around a command: its statuses, its last words, and the imports that it puts off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[4]
DEFERRED = ("charset_normalizer", "idna", "importlib.metadata", "urllib.request", "zipfile")


def run(*arguments: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *arguments], cwd=TOP, capture_output=True, timeout=60, **more)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--version"], 0), (["digest", "--help"], 0), (["digest"], 2), (["tags", "ls", "x:y"], 2), (["nonsense"], 2)],
)
def test_status(words: list[str], status: int) -> None:
    done = run("-m", "builder", *words)
    assert done.returncode == status
    assert bool(done.stdout) == (status == 0)
    assert bool(done.stderr) == (status != 0)


def test_full_disk_is_no_success() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "builder", "--version"], cwd=TOP, stdout=full, timeout=60)
    assert done.returncode != 0


def test_closed_pipe_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        command = [sys.executable, "-m", "builder", "--version"]
        done = subprocess.run(command, cwd=TOP, stdout=pipe, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (141, b"")


ENDS = """
import atexit, sys, threading, time
from builder.cli import main, program
def command():
    atexit.register(print, "at exit")
    {body}
    return 7
main.main = command
program.program()
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('done')", b"done\nat exit\n"),
        ("threading.Thread(target=lambda: (time.sleep(0.2), print('late', flush=True))).start()", b"late\nat exit\n"),
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", b"at exit\n"),
        ("sys.setprofile(lambda *_: None)", b"at exit\n"),
    ],
)
def test_what_was_registered_and_who_still_works_is_waited_for(body: str, said: bytes) -> None:
    done = run("-c", ENDS.format(body=body))
    assert (done.returncode, done.stdout) == (7, said), done.stderr


def test_imports_are_put_off() -> None:
    code = (
        "from builder.cli import deferred; deferred.install(); deferred.install()\n"
        "import sys, requests, urllib3\n"
        f"print(*(n for n in {DEFERRED!r} if type(sys.modules[n]).__name__ != '_Deferred'))\n"
        "print('charset_normalizer.api' in sys.modules)\n"
    )
    done = run("-W", "error", "-c", code)
    assert done.stdout.split() == [b"False"], done.stderr


@pytest.mark.parametrize(
    "use",
    [
        "import requests; r = requests.Response(); r._content = 'Grüße'.encode(); assert r.text == 'Grüße'",
        "import requests, charset_normalizer as c; assert c.detect(b'abc') and requests.compat.chardet is c",
        "import charset_normalizer as c; assert c.__version__[0].isdigit() and c.from_bytes(b'abc').best()",
        "from charset_normalizer.api import from_bytes as f; import charset_normalizer as c; assert c.from_bytes is f",
        "from importlib.metadata import version; assert version('requests') == version('requests')",
        "import importlib.metadata as m; assert m.version('idna') and m.distribution('idna') and m.version('idna')",
        "import urllib3.http2 as h; assert h.version('urllib3') == h.version('urllib3')",
        "import importlib; import importlib.metadata; assert importlib.metadata.PackageNotFoundError",
        "import idna; assert idna.encode('köln.example') == b'xn--kln-sna.example'",
        "import requests; assert requests.Request('GET', 'http://köln.example/').prepare().url.startswith('http://xn--')",
        "import zipfile, io; assert not zipfile.is_zipfile(io.BytesIO(b'no'))",
        "import copy, pickle, idna; assert pickle.loads(pickle.dumps(idna.IDNAError)) is idna.IDNAError",
        "import oras.client",
        "import datetime as d; assert d.datetime.strptime('2020', '%Y') and d.timezone.utc and d.MAXYEAR == 9999",
        "import datetime as d, pickle; assert pickle.loads(pickle.dumps(d.timedelta(1))) == d.timedelta(1)",
        "import gettext as g; assert g.gettext('a') == 'a' and g.ngettext('a', 'b', 2) == 'b' and g.NullTranslations",
        "import pathlib, urllib.parse as u; assert pathlib.Path('/a b').as_uri() == 'file:///a%20b' and u.quote('/ ')",
        "import requests.utils as u; assert u.getproxies() == {} and not u.proxy_bypass('x')",
        "from urllib.request import getproxies as g, Request; assert g() == {} and Request('http://x/').host == 'x'",
        "import tempfile; tempfile.TemporaryFile().close(); import urllib.error; urllib.error.URLError('x')",
        "import http.cookiejar, requests; requests.Session().cookies.set('a', 'b')",
        "from tempfile import NamedTemporaryFile as n, _TemporaryFileWrapper as w; assert isinstance(n(), w)",
        "import mimetypes; assert mimetypes.guess_type('a.txt')[0] == 'text/plain'",
        "from urllib3.fields import guess_content_type as g; assert g('a.txt') == 'text/plain'",
    ],
)  # fmt: skip
def test_what_was_put_off_is_whole_when_used(use: str) -> None:
    done = run("-W", "error", "-c", f"from builder.cli import deferred; deferred.install()\n{use}")
    assert done.returncode == 0, done.stderr.decode()


def test_a_missing_attribute_is_named() -> None:
    done = run("-c", "from builder.cli import deferred; deferred.install()\nimport idna; idna.nothing")
    assert b"module 'idna' has no attribute 'nothing'" in done.stderr


def test_a_failing_import_stays_one() -> None:
    """What a deferred module raises when it is filled reaches whoever asked."""
    done = run("-c", "from builder.cli import deferred; deferred.install()\nimport importlib.metadata as m\n"
               "m.version('no such distribution')")  # fmt: skip
    assert b"PackageNotFoundError" in done.stderr
