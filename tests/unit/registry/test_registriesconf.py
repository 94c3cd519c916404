"""registries.conf: merging, versions, and complaints that name file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import ConfigError
from registry.reference import Reference
from registry.registriesconf import RegistriesConf, load_registries_conf


def load(tmp_path: Path, text: str) -> RegistriesConf:
    path = tmp_path / "r.conf"
    path.write_text(text)
    return load_registries_conf(str(path), {})


def test_user_file_and_drop_ins_merge_in_order(tmp_path: Path) -> None:
    base = tmp_path / ".config/containers"
    drop = base / "registries.conf.d"
    drop.mkdir(parents=True)
    (base / "registries.conf").write_text(
        'unqualified-search-registries = ["main.x"]\n'
        '[[registry]]\nprefix = "h.x"\nlocation = "main.net"\n'
        '[[registry]]\nlocation = "kept.x"\n'
        '[aliases]\n"a" = "main.x/a"\n"b" = "main.x/b"\n'
    )
    (drop / "20-second.conf").write_text('[[registry]]\nprefix = "h.x"\nlocation = "second.net"\n[aliases]\n"b" = ""\n')
    (drop / "10-first.conf").write_text('unqualified-search-registries = ["first.x"]\nshort-name-mode = "enforcing"\n')
    (drop / "ignored.txt").write_text("not toml at all [")
    conf = load_registries_conf(None, {"HOME": str(tmp_path)})
    assert conf.search == ("first.x",)
    assert conf.short_name_mode == "enforcing"
    assert conf.aliases["a"][0] == "main.x/a" and "b" not in conf.aliases
    table = conf.find(Reference.parse("h.x/a"))
    assert table is not None and table.location == "second.net" and table.origin.endswith("20-second.conf:1")
    assert conf.find(Reference.parse("kept.x/a")) is not None


def test_files_of_aliases_alone_are_read_for_short_names_only(tmp_path: Path) -> None:
    base = tmp_path / ".config/containers"
    drop = base / "registries.conf.d"
    drop.mkdir(parents=True)
    (base / "registries.conf").write_text("# nothing\n\n  # but comments\n")
    (drop / "names.conf").write_text('# c\n[aliases]\n  "a" = "q.x/a"\n')
    (drop / "more.conf").write_text('[aliases]\n"b" = "q.x/b"\n[[registry]]\nlocation = "h.x"\n')
    env = {"HOME": str(tmp_path)}
    whole, part = load_registries_conf(None, env), load_registries_conf(None, env, aliases=False)
    assert {"a", "b"} <= set(whole.aliases) and "a" not in part.aliases
    assert whole.find(Reference.parse("h.x/a")) is not None and part.find(Reference.parse("h.x/a")) is not None
    assert not any(f.endswith("registries.conf") and f.startswith(str(base)) for f in whole.files)


def test_nothing_configured(tmp_path: Path) -> None:
    conf = load_registries_conf(None, {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "none")})
    assert conf.find(Reference.parse("h.x/a")) is None


def test_version_1(tmp_path: Path) -> None:
    conf = load(
        tmp_path,
        "[registries.search]\nregistries = ['s.x']\n[registries.insecure]\nregistries = ['i.x']\n"
        "[registries.block]\nregistries = ['b.x', 'i.x']\n",
    )
    assert conf.search == ("s.x",)
    assert {t.prefix: (t.insecure, t.blocked) for t in conf.tables} == {"i.x": (True, True), "b.x": (False, True)}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[registry]\n", "r.conf: .*line 1"),
        ("[[registry]]\n", "r.conf:1: .*prefix or a location"),
        ("\n[[registry]]\nlocation = 5\n", "r.conf:2: location is not a string"),
        ('[[registry]]\nlocation = "h"\ninsecure = "yes"\n', "insecure is neither"),
        ('[[registry]]\nlocation = "https://h"\n', "without a scheme"),
        ('[[registry]]\nprefix = "*h.x"\n', "wildcard"),
        ('[[registry]]\nprefix = "*.h.x/path"\n', "wildcard"),
        ('[[registry]]\nlocation = "h"\n[[registry.mirror]]\ninsecure = true\n', "r.conf:3: a mirror needs"),
        ('[[registry]]\nlocation = "h"\n[[registry.mirror]]\nlocation="m"\npull-from-mirror="x"\n', "pull-from-mirror"),
        ('registry = "x"\n', "array of tables"),
        ('short-name-mode = "maybe"\n', "short-name-mode"),
        ("unqualified-search-registries = 3\n", "array of strings"),
        ('[aliases]\n"a.b/c" = "d.e/f"\n', "alias"),
        ('[aliases]\n"a" = "b"\n', "alias"),
        ('[aliases]\n"a" = "d.e/f:tag"\n', "alias"),
        ('[aliases]\n"a" = "D.e/F"\n', "alias"),
        ("a = " + "[" * 20000, "r.conf"),
    ],
)
def test_malformed(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(tmp_path, text)


def test_missing_explicit_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_registries_conf(str(tmp_path / "none"), {})
    with pytest.raises(ConfigError, match="no such file"):
        load_registries_conf(None, {"CONTAINERS_REGISTRIES_CONF": str(tmp_path / "none")})


def test_not_utf8_and_too_large(tmp_path: Path) -> None:
    path = tmp_path / "r.conf"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_registries_conf(str(path), {})
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(ConfigError, match="larger"):
        load_registries_conf(str(path), {})
