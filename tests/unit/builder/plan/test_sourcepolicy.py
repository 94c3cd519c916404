"""Source policies: which sources a build may use, and what stands in for them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import UsageError
from builder.plan.sourcepolicy import Rule, Source, SourceDenied, SourcePolicy, parse_policy, policy_document

ALPINE = "docker-image://docker.io/library/alpine"
DIGEST = "sha256:" + "a" * 64


def policy(*rules: dict[str, Any], complete: bool = False) -> SourcePolicy:
    return SourcePolicy((parse_policy(json.dumps({"rules": rules}).encode(), "p.json"),), complete)


def rule(action: str, identifier: str, to: str = "", **more: Any) -> dict[str, Any]:
    selector = {"identifier": identifier, **more}
    return {"action": action, "selector": selector, **({"updates": {"identifier": to}} if to else {})}


def test_without_a_rule_everything_is_as_asked_for() -> None:
    empty = policy()
    assert empty.image("alpine") == "alpine"
    assert empty.http("https://example.com/a.tar") == ("https://example.com/a.tar", "")
    assert empty.git("https://example.com/a.git#main:sub") == ("https://example.com/a.git#main:sub", "")
    empty.local("")
    empty.layout("dir:tag")


def test_the_last_of_allow_and_deny_counts() -> None:
    only = policy(rule("DENY", "docker-image://*"), rule("ALLOW", f"{ALPINE}:*"))
    assert only.image("alpine:3") == "alpine:3"
    with pytest.raises(SourceDenied, match=r"docker\.io/library/debian:latest.*denied by policy"):
        only.image("debian")
    with pytest.raises(SourceDenied):
        policy(rule("ALLOW", f"{ALPINE}:*"), rule("DENY", "docker-image://*")).image("alpine")


def test_each_policy_may_deny() -> None:
    first = parse_policy(json.dumps({"rules": [rule("DENY", "*"), rule("ALLOW", "*")]}).encode(), "a")
    second = parse_policy(json.dumps({"rules": [rule("DENY", "https://*")]}).encode(), "b")
    both = SourcePolicy((first, second))
    assert both.image("alpine") == "alpine"
    with pytest.raises(SourceDenied):
        both.http("https://example.com/x")


def test_a_conversion_is_judged_anew() -> None:
    both = policy(
        rule("CONVERT", f"{ALPINE}:latest", "docker-image://quay.io/own/alpine:3"),
        rule("CONVERT", "docker-image://quay.io/own/alpine:3", f"docker-image://quay.io/own/alpine@{DIGEST}"),
    )
    assert both.image("alpine") == f"quay.io/own/alpine@{DIGEST}"
    denied = policy(
        rule("CONVERT", f"{ALPINE}:latest", "docker-image://quay.io/own/alpine:3"), rule("DENY", "docker-image://quay.io/*")
    )  # fmt: skip
    with pytest.raises(SourceDenied, match=r"quay\.io"):
        denied.image("alpine")


def test_a_conversion_that_leads_back_ends() -> None:
    circle = policy(
        rule("CONVERT", f"{ALPINE}:latest", f"{ALPINE}:3"), rule("CONVERT", f"{ALPINE}:3", f"{ALPINE}:latest")
    )
    with pytest.raises(SourceDenied, match="without end"):
        circle.image("alpine")


@pytest.mark.parametrize(
    "selector, match",
    [("docker-image://docker.io/library/*:*", "WILDCARD"), ("docker-image://docker.io/library/(.+):(.*)", "REGEX")],
)
def test_what_matched_can_be_used(selector: str, match: str) -> None:
    mirror = policy(rule("CONVERT", selector, "docker-image://mirror.test/hub/$1:${2}", matchType=match))
    assert mirror.image("alpine:3") == "mirror.test/hub/alpine:3"
    assert mirror.image("ghcr.io/o/p:1") == "ghcr.io/o/p:1"


def test_an_exact_selector_has_no_wildcards() -> None:
    exact = policy(rule("DENY", f"{ALPINE}:*", matchType="EXACT"))
    assert exact.image("alpine") == "alpine"
    # Numbers stand for the words, as in protobuf's JSON.
    assert policy(rule("DENY", f"{ALPINE}:*", matchType=1)).image("alpine") == "alpine"


def test_a_checksum_is_set() -> None:
    url = "https://example.com/a.tar"
    pins = policy(
        {"action": "CONVERT", "selector": {"identifier": url}, "updates": {"attrs": {"http.checksum": DIGEST}}}
    )
    assert pins.http(url) == (url, DIGEST)
    assert pins.http("https://example.com/b.tar") == ("https://example.com/b.tar", "")


def test_constraints_look_at_attributes() -> None:
    url = "https://example.com/a.tar"
    unchecked = policy(
        rule("DENY", "https://*", constraints=[{"key": "http.checksum", "value": "^sha256:", "condition": "NOTEQUAL"}]),
        rule("ALLOW", "https://*", constraints=[{"key": "http.checksum", "value": "^sha256:", "condition": "MATCHES"}]),
    )
    assert unchecked.http(url, DIGEST) == (url, DIGEST)
    with pytest.raises(SourceDenied):
        unchecked.http(url)


def test_repositories() -> None:
    commit = "b" * 40
    pins = policy(rule("CONVERT", "git://example.com/a.git#main", f"git://example.com/a.git#{commit}"))
    assert pins.git("https://example.com/a.git#main") == (f"https://example.com/a.git#{commit}", "")
    assert pins.git("https://example.com/a.git#dev") == ("https://example.com/a.git#dev", "")
    moved = policy(rule("CONVERT", "git://example.com/*", "git://mirror.test/$1"))
    assert moved.git("https://example.com/a.git#main:sub") == ("https://mirror.test/a.git#main:sub", "")
    assert moved.git("git@example.org:o/a.git") == ("git@example.org:o/a.git", "")
    with pytest.raises(SourceDenied):
        policy(rule("DENY", "git://git@example.org/*")).git("git@example.org:o/a.git")


def test_local_sources() -> None:
    with pytest.raises(SourceDenied):
        policy(rule("DENY", "local://context")).local("")
    with pytest.raises(SourceDenied):
        policy(rule("DENY", "oci-layout://*")).layout("dir:tag")


def test_a_complete_policy_refuses_what_is_not_pinned() -> None:
    commit = "c" * 40
    locked = policy(rule("CONVERT", f"{ALPINE}:latest", f"{ALPINE}:latest@{DIGEST}"), complete=True)
    assert locked.image("alpine") == f"docker.io/library/alpine:latest@{DIGEST}"
    assert locked.image(f"debian@{DIGEST}") == f"debian@{DIGEST}"
    assert locked.http("https://example.com/a", DIGEST).checksum == DIGEST
    assert locked.git(f"https://example.com/a.git#{commit}").source.endswith(commit)
    with pytest.raises(SourceDenied, match="not in the lock file"):
        locked.image("debian")
    with pytest.raises(SourceDenied, match="not in the lock file"):
        locked.http("https://example.com/a")
    with pytest.raises(SourceDenied, match="not in the lock file"):
        locked.git("https://example.com/a.git#main")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"rules": 1}', '{"rules": [1]}', '{"rules": [{"action": "MAYBE"}]}', '{"rules": [{}]}',
        '{"rules": [{"action": "CONVERT", "selector": {"identifier": "a"}}]}',
        '{"rules": [{"selector": {"identifier": "(", "matchType": "REGEX"}}]}', "[" * 100_000,
        '{"rules": [{"selector": "a"}]}', '{"rules": [{"selector": {"identifier": "a", "constraints": [{}]}}]}',
        '{"rules": [{"action": "CONVERT", "selector": {"identifier": "a"}, "updates": {"attrs": ["b"]}}]}',
    ],
)  # fmt: skip
def test_a_damaged_document_is_one_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"p\.json is no source policy"):
        parse_policy(text.encode(), "p.json")


@given(st.text("ab*", max_size=6), st.text("ab", max_size=9))
def test_wildcards_are_those_of_a_regex_that_takes_what_it_can(selector: str, text: str) -> None:
    wanted = re.fullmatch("(.*)".join(map(re.escape, selector.split("*"))), text)
    found = Rule("ALLOW", selector).matches(Source(text))
    assert found == (None if wanted is None else (text, *wanted.groups()))


def test_many_wildcards_take_no_time() -> None:
    assert Rule("DENY", "*a" * 60 + "b").matches(Source("docker-image://" + "a" * 200)) is None


def test_a_group_that_there_is_not_is_empty() -> None:
    changed = policy(rule("CONVERT", f"{ALPINE}:3", f"{ALPINE}:4$7$" + "9" * 5000))
    assert changed.image("alpine:3") == "docker.io/library/alpine:4"


def test_rules_survive_writing() -> None:
    rules = (
        Rule("CONVERT", f"{ALPINE}:3", "EXACT", identifier=f"{ALPINE}:3@{DIGEST}"),
        Rule("CONVERT", "https://e.com/a", "EXACT", attributes=(("http.checksum", DIGEST),)),
        Rule("DENY", "*"),
    )
    assert parse_policy(policy_document(rules), "x") == rules
