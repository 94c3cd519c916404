"""What comes from a server may be anything: parsers neither raise what they should not nor hang."""

from __future__ import annotations

import json
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from registry.answers import next_link
from registry.auth import Scope, parse_challenges
from registry.errors import RegistryError, ServerError, printable, redact_url
from registry.http import join_url, origin_of
from registry.retry import parse_retry_after
from registry.uploads import UploadSession
from registry.wire import Reply, parse_error_body

HEADER = st.text(alphabet=st.characters(max_codepoint=255), max_size=200)
SYNTAX = st.text(alphabet='Bearer basic=",\\ \t:/;~x', max_size=80)


@given(HEADER | SYNTAX)
def test_challenges(header: str) -> None:
    for challenge in parse_challenges(header):
        assert challenge.scheme == challenge.scheme.lower() != ""


def test_challenges_are_parsed_in_linear_time() -> None:
    started = time.thread_time()
    for header in (
        'Bearer a="' + "\\" * 100_000,
        "a=" * 100_000,
        "a " * 100_000,
        ", " * 100_000,
        "Basic " + "=" * 100_000,
    ):
        parse_challenges(header)
    assert time.thread_time() - started < 10  # of this thread's own work: the machine may be busy


@given(HEADER)
def test_scopes_round_trip(text: str) -> None:
    scope = Scope.parse(text)
    if scope is not None and scope.actions:
        assert Scope.parse(str(scope)) == scope


@given(st.text(max_size=200))
def test_redaction_leaves_no_query_and_no_password(text: str) -> None:
    for url in (f"https://h/x?{text}", f"https://u:{text.replace('/', '').replace('?', '').replace('#', '')}@h/x"):
        assert redact_url(url) in {"https://h/x?…", "https://h/x"} or "secret" not in text
    assert printable(text).isprintable()


@given(st.text(alphabet="htps:/.@?#[]%x5 \n\\", max_size=40))
def test_locations_are_urls_or_refused(text: str) -> None:
    try:
        joined = join_url("https://h.x/v2/a/", text)
    except ServerError:
        return
    assert joined.startswith(("http://", "https://"))
    assert origin_of(joined).count(":") >= 2


@given(HEADER)
def test_links(text: str) -> None:
    try:
        found = next_link(Reply(200, {"Link": text}, b"", "https://h.x/v2/a/tags/list"))
    except RegistryError:
        return
    assert found is None or found.startswith(("http://", "https://"))


@given(HEADER)
def test_retry_after(text: str) -> None:
    seconds = parse_retry_after(text)
    assert seconds is None or seconds >= 0


@given(st.binary(max_size=200))
def test_error_bodies(body: bytes) -> None:
    _, text = parse_error_body(body)
    assert text.isprintable()


def test_what_a_registry_says_of_several_blobs_is_said_once_each() -> None:
    one, other = ({"code": "X", "message": "no blob", "detail": f"sha256:{c * 64}"} for c in "ab")
    codes, text = parse_error_body(json.dumps({"errors": [one, one, other]}).encode())
    assert codes == ("X", "X", "X")
    assert text == f"X: no blob: {one['detail']}; X: no blob: {other['detail']}"


@given(st.text(max_size=100) | st.sampled_from(["{}", "[]", "null", '{"registry": 1}']))
@settings(max_examples=50)
def test_saved_sessions(text: str) -> None:
    from layers.errors import ImageError

    try:
        UploadSession.from_json(text)
    except ImageError:
        return
    raise AssertionError("no session was in there")


def test_a_saved_session_round_trips() -> None:
    session = UploadSession("h.x", "a/b", "https://h.x/up?_state=sesame", 5, "sha256:" + "a" * 64, 10)
    assert UploadSession.from_json(session.to_json()) == session
    assert "sesame" not in repr(session)
