"""`tags`, `catalog`, `digest`, `delete`, `blob`, `ratelimit`, `validate`, `artifact`, `sync`, `registry explain`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import api
from layers.store import Store
from registry.hosts import RegistryOptions
from tests.integration.registry.commands import CommandLine, cli, put
from tests.integration.registry.servers import Exchange, Fault, FaultProxy
from tests.support.images import OCI_LAYER, Blob, Image, make_image, write_layout
from tests.support.registries import RegistryServer

__all__ = ["cli"]


@pytest.fixture
def tagged(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> str:
    """A repository with tags; its name."""
    name = f"{fresh_registry.host}/team/tagged"
    layout = write_layout(tmp_path / "tagged", t=make_image())
    for tag in ("1.10", "1.9", "1.9-rc1", "latest", "v2.0"):
        cli("copy", f"oci:{layout}:t", f"docker://{name}:{tag}")
    return name


def test_tags_are_sorted_and_filtered(cli: CommandLine, tagged: str) -> None:
    assert cli("tags", "ls", tagged).text.split() == ["1.10", "1.9", "1.9-rc1", "latest", "v2.0"]
    by_version = ["1.9-rc1", "1.9", "1.10", "v2.0", "latest"]
    assert cli("tags", "ls", tagged, "--sort", "version").text.split() == by_version
    assert (
        cli("tags", "ls", tagged, "--sort", "version", "--reverse", "--limit", "2").text.split() == by_version[:-3:-1]
    )
    assert cli("tags", "ls", tagged, "--include", "1.*", "--exclude", "/rc/").text.split() == ["1.10", "1.9"]
    listed = cli("tags", "ls", f"docker://{tagged}", "--json").json()
    assert listed["Repository"] == tagged
    digest = cli("digest", f"{tagged}:latest").text
    assert cli("tags", "ls", tagged, "--digests", "--include", "latest").text.split() == [digest, "latest"]
    assert cli("catalog", tagged.partition("/")[0]).text == "team/tagged"
    assert cli("catalog", tagged.partition("/")[0], "--exclude", "team/*", "--json").json() == []
    assert "names an image" in cli("tags", "ls", f"{tagged}:latest", status=2).err
    cli("tags", "ls", tagged, "--include", "/(/", status=2)
    cli("tags", "ls", tagged.replace("tagged", "nothing"), status=4)


def test_a_tag_goes_without_its_manifest(cli: CommandLine, tagged: str, fresh_registry: RegistryServer) -> None:
    """docker-registry 2.8 deletes by digest only, which would take all five tags."""
    cli("tags", "rm", f"{tagged}:1.9")
    assert cli("tags", "ls", tagged).text.split() == ["1.10", "1.9-rc1", "latest", "v2.0"]
    cli("delete", "--tag-only", f"{tagged}:v2.0")
    assert fresh_registry.manifest("team/tagged", "latest")
    digest = cli("digest", "--full-ref", f"{tagged}:latest").text
    cli("delete", digest)
    cli("digest", f"{tagged}:latest", status=4)
    cli("delete", f"{tagged}:latest", status=4)
    for words in (("delete",), ("delete", "--tag-only"), ("tags", "rm")):
        assert "names a repository" in cli(*words, tagged, status=2).err
    assert "invalid digest" in cli("blob", "get", tagged, "sha256:zz", status=2).err


def test_blobs(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    repository = f"{fresh_registry.host}/blobs"
    data = b"0123456789" * 1000
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    (tmp_path / "file").write_bytes(data)
    assert cli("blob", "put", repository, tmp_path / "file").text == digest
    assert cli("blob", "put", repository, stdin=b"x").text == f"sha256:{hashlib.sha256(b'x').hexdigest()}"
    assert cli("blob", "head", repository, digest).text == "10000"
    assert cli("blob", "get", repository, digest).out == data
    cli("blob", "get", f"{repository}@{digest}", "-o", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    before = len(fresh_registry.requests_seen())
    cli("blob", "put", f"{fresh_registry.host}/other", tmp_path / "file", "--mount-from", repository)
    assert not [r for r in fresh_registry.requests_seen()[before:] if r.startswith("PUT")]
    cli("blob", "rm", repository, digest)
    cli("blob", "get", repository, digest, status=4)
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_blob_is_not_left_behind(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    with FaultProxy(f"127.0.0.1:{fresh_registry.port}") as proxy:
        digest = cli("blob", "put", f"{proxy.host}/b", stdin=b"data" * 100).text
        proxy.rule = lambda e: Fault(corrupt_at=5) if e.method == "GET" and "/blobs/" in e.path else None
        cli("blob", "get", f"{proxy.host}/b", digest, "-o", tmp_path / "out", status=8)
    assert list(tmp_path.glob("out*")) == []


def test_validate_finds_what_is_wrong(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    image = make_image([{"f": b"1" * 5000}])
    layout = write_layout(tmp_path / "l", t=image)
    assert cli("validate", f"oci:{layout}:t").text.endswith("all is right")
    config = json.loads(image.blobs[0].data)
    config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    blob = Blob(json.dumps(config).encode(), image.blobs[0].media_type)
    document = {**image.document(), "config": blob.descriptor()}
    lying = Image(Blob(json.dumps(document).encode(), image.top.media_type), (blob, *image.blobs[1:]))
    write_layout(tmp_path / "lying", t=lying)
    found = cli("validate", "--json", f"oci:{tmp_path}/lying:t", status=1).json()["problems"]
    assert ["unpacks to" in p["what"] for p in found] == [True]
    layer = tmp_path / "l/blobs" / image.document()["layers"][0]["digest"].replace(":", "/")
    layer.write_bytes(bytes(len(layer.read_bytes())))
    assert "sha256" in cli("validate", f"oci:{layout}:t", status=1).text
    layer.unlink()
    cli("validate", "--fast", f"oci:{layout}:t", status=1)
    cli("validate", f"docker://{fresh_registry.host}/nothing:1", status=4)
    put(cli, tmp_path, make_image(), f"docker://{fresh_registry.host}/whole:1")
    cli("validate", "--fast", f"docker://{fresh_registry.host}/whole:1")


def test_ratelimit_is_told(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    headers = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "7;w=21600"}
    with FaultProxy(f"127.0.0.1:{fresh_registry.port}", lambda e: Fault(set_headers=headers)) as proxy:
        put(cli, tmp_path, make_image(), f"docker://{proxy.host}/x:1")
        assert cli("ratelimit", f"{proxy.host}/x:1").text.startswith("7 of 100 pulls left, per 6 hours")
        assert cli("ratelimit", "--json", f"{proxy.host}/x:1").json() == {"Limit": 100, "Remain": 7, "Window": 21600}
        assert f"{proxy.host}: 7 of 100 pulls left" in cli("pull", f"{proxy.host}/x:1").err
    assert "no limit" in cli("ratelimit", f"{fresh_registry.host}/x:1").text


def test_artifacts_by_command(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    (tmp_path / "bom.json").write_bytes(b"{}\n")
    name = f"{fresh_registry.host}/art"
    image = make_image()
    put(cli, tmp_path, image, f"docker://{name}:img")
    cli("artifact", "push", f"{name}:1", f"{tmp_path}/bom.json:application/json", "--type", "a/b", "-a", "k=v")
    pushed = cli("artifact", "inspect", f"{name}:1").json()
    assert (pushed["artifactType"], pushed["annotations"]["k"]) == ("a/b", "v")
    assert pushed["layers"][0]["mediaType"] == "application/json"
    sbom = cli("artifact", "attach", f"{name}:img", tmp_path / "bom.json", "--type", "sbom/x").text
    signature = cli("artifact", "attach", f"{name}@{sbom}", tmp_path / "bom.json", "--type", "sig/x").text
    assert cli("artifact", "ls", f"{name}:img").text == f"{sbom}  sbom/x"
    tree = cli("artifact", "tree", f"{name}:img").text.splitlines()
    assert tree[2:] == [f"└── sbom/x: {sbom}", f"    └── sig/x: {signature}"]
    assert cli("artifact", "pull", f"{name}@{sbom}", "-o", tmp_path / "out").text == f"{tmp_path}/out/bom.json"
    assert (tmp_path / "out/bom.json").read_bytes() == b"{}\n"
    # The image with all that belongs to it, and cosign's tags.
    cli("copy", f"docker://{name}:1", f"docker://{name}:{image.digest.replace(':', '-')}.sig")
    cli("copy", "--referrers", "--digest-tags", f"docker://{name}:img", f"docker://{fresh_registry.host}/moved:1")
    moved = cli("artifact", "tree", f"{fresh_registry.host}/moved:1").text.splitlines()
    assert moved[2:] == tree[2:]
    assert f"{image.digest.replace(':', '-')}.sig" in cli("tags", "ls", f"{fresh_registry.host}/moved").text.split()
    cli("artifact", "attach", f"{name}:none", tmp_path / "bom.json", status=4)
    cli("artifact", "push", f"{name}:2", tmp_path / "missing", status=1)


def test_sync_by_command(cli: CommandLine, tmp_path: Path, tagged: str, fresh_registry: RegistryServer) -> None:
    file = tmp_path / "sync.yaml"
    file.write_text(json.dumps({"images": [{"source": tagged, "tags": ["1.*"], "exclude": ["*-rc1"]}]}))
    there = f"docker://{fresh_registry.host}/mirror"
    assert cli("sync", "--dry-run", file, there).text.count("would: ") == 2
    assert cli("sync", file, there).text.endswith("2 copied, 0 unchanged, 0 deleted, 0 failed, 0 bytes moved")
    put(cli, tmp_path, make_image(), f"{there}/team/tagged:old")
    again = cli("sync", file, there, "--delete", "--json").json()
    assert (len(again["unchanged"]), again["deleted"]) == (2, [f"{there}/team/tagged:old"])
    cli("sync", file, f"oci:{tmp_path}/layouts")
    assert (tmp_path / "layouts/team/tagged/index.json").exists()
    file.write_text(json.dumps({"images": [f"{fresh_registry.host}/nothing", {"source": tagged, "tags": ["latest"]}]}))
    failed = cli("sync", file, there, status=4)
    assert "1 copied, 0 unchanged, 0 deleted, 1 failed" in failed.text
    cli("sync", file, there, "--keep-going")
    file.write_text("images: [{source: a, tgas: [x]}]")
    assert "tgas" in cli("sync", file, there, status=2).err


def test_explain_tells_what_set_each_endpoint(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    conf = tmp_path / "registries.conf"
    conf.write_text(
        f'[[registry]]\nprefix = "r.example"\nlocation = "localhost:1/up"\n\n[[registry.mirror]]\n'
        f'location = "{fresh_registry.host}/mirror"\n\n[aliases]\n"short" = "r.example/team/short"\n'
    )
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "reject"}]}')
    found = cli(
        "registry", "explain", "short", "--registries-conf", conf, "--signature-policy", policy, "--json",
    ).json()  # fmt: skip
    (meaning,) = found["means"]
    assert (found["set by"], meaning["reference"]) == (f"alias of {conf}:9", "r.example/team/short:latest")
    assert "rejects this image" in meaning["policy"]
    first, second = meaning["endpoints"]
    assert first["url"].endswith(f"{fresh_registry.host}/v2/mirror/team/short")
    assert (first["mirror"], first["set by"]) == (True, f"{conf}:5")
    assert "answers, and accepts us" in first["probe"]
    assert (second["set by"], "connection refused" in second["probe"]) == (f"{conf}:1", True)
    text = cli("registry", "explain", "short", "--registries-conf", conf, "--no-probe", "--creds", "me:s3cret").text
    assert "s3cret" not in text
    assert f"set by: {conf}:5" in text
    assert "probe" not in text


def test_which_mirror_served_is_told(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    put(cli, tmp_path, make_image(), f"docker://{fresh_registry.host}/mirror/app:1")
    conf = tmp_path / "registries.conf"
    conf.write_text(
        f'[[registry]]\nprefix = "r.example"\n[[registry.mirror]]\nlocation = "{fresh_registry.host}/mirror"\n'
    )
    told = cli("pull", "r.example/app:1", "--registries-conf", conf)
    assert f"r.example/app:1 came from the mirror {fresh_registry.host} ({conf}:3)" in told.err
    copied = cli("copy", "docker://r.example/app:1", f"oci:{tmp_path}/out:t", "--registries-conf", conf)
    assert f"came from the mirror {fresh_registry.host}" in copied.err
    # A mirror that has not everything: each part is told with whom it came from.
    layer = make_image()
    put(cli, tmp_path, layer, f"docker://{fresh_registry.host}/origin/part:1")
    put(cli, tmp_path, layer, f"docker://{fresh_registry.host}/mirror/part:1")
    gone = layer.blobs[1].digest
    with FaultProxy(
        f"127.0.0.1:{fresh_registry.port}",
        lambda e: Fault(status=404) if f"mirror/part/blobs/{gone}" in e.path else None,
    ) as proxy:
        conf.write_text(
            f'[[registry]]\nprefix = "r.example"\nlocation = "{fresh_registry.host}/origin"\n'
            f'[[registry.mirror]]\nlocation = "{proxy.host}/mirror"\n'
        )
        told = cli("pull", "r.example/part:1", "--registries-conf", conf)
        line = next(line for line in told.err.splitlines() if "came from the registry" in line)
        assert f"blob {gone[7:19]}" in line
        assert f"{fresh_registry.host} ({conf}:1)" in line
        line = next(line for line in told.err.splitlines() if f"came from the mirror {proxy.host}" in line)
        # One blob that it lacks is no reason to leave it for the others.
        for part in (f"manifest {layer.digest[7:19]}", f"blob {layer.blobs[2].digest[7:19]}"):
            assert part in line
    assert "r.example/app" in cli("images").text


def test_short_names_mean_what_is_configured(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    image = make_image()
    put(cli, tmp_path, image, f"docker://{fresh_registry.host}/team/app:1")
    conf = tmp_path / "registries.conf"
    conf.write_text(f'[aliases]\n"app" = "{fresh_registry.host}/team/app"\n')
    assert cli("pull", "app:1", "--registries-conf", conf).text == image.digest
    conf.write_text(f'unqualified-search-registries = ["localhost:1", "{fresh_registry.host}/team"]\n')
    assert cli("pull", "app:1", "--registries-conf", conf).text == image.digest
    means = cli("registry", "explain", "app:1", "--registries-conf", conf, "--no-probe").text
    assert f"search registries of {conf}:1" in means
    none = cli("pull", "app:2", "--registries-conf", conf, status=4)
    assert "'app:2' may mean: localhost:1" in none.err
    conf.write_text('unqualified-search-registries = ["a.example", "b.example"]\nshort-name-mode = "enforcing"\n')
    assert "is ambiguous" in cli("pull", "app:1", "--registries-conf", conf, status=2).err


def test_statuses_tell_failures_apart(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    answers: dict[str, Fault] = {
        "auth": Fault(status=403),
        "limit": Fault(status=429, headers={"Retry-After": "0"}),
        "server": Fault(status=500),
        "digest": Fault(corrupt_at=10),
    }

    def rule(exchange: Exchange) -> Fault | None:
        return next((f for name, f in answers.items() if f"/{name}/manifests" in exchange.path), None)

    with FaultProxy(f"127.0.0.1:{fresh_registry.port}", rule) as proxy:
        image = make_image()
        layout = write_layout(tmp_path / "l", t=image)
        for name in ("auth", "limit", "server", "digest"):
            cli("copy", f"oci:{layout}:t", f"docker://{fresh_registry.host}/{name}:1")
        for name, status in (("auth", 3), ("nothing", 4), ("limit", 5), ("server", 7), ("digest", 8)):
            cli("pull", f"{proxy.host}/{name}:1", "--retry", "1", "--retry-delay", "1ms", status=status)
        assert proxy.count("GET", "/server/manifests") == 2
    cli("pull", "localhost:1/x", "--retry", "0", status=6)
    cli("pull", "app/UPPER", status=2)


def test_policies_hold_for_every_transport(cli: CommandLine, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "l", t=make_image())
    policy = tmp_path / "policy.json"
    policy.write_text(
        json.dumps({
            "default": [{"type": "insecureAcceptAnything"}],
            "transports": {"oci": {str(tmp_path): [{"type": "reject"}]}, "dir": {"": [{"type": "signedBy"}]}},
        })
    )  # fmt: skip
    refused = cli("pull", f"oci:{layout}:t", "--signature-policy", policy, status=2)
    assert "rejects this image" in refused.err
    cli("copy", f"oci:{layout}:t", f"dir:{tmp_path}/d")
    assert "signedBy" in cli("pull", f"dir:{tmp_path}/d", "--signature-policy", policy, status=2).err
    cli("copy", f"dir:{tmp_path}/d", f"oci-archive:{tmp_path}/a.tar:t")
    cli("pull", f"oci-archive:{tmp_path}/a.tar:t", "--signature-policy", policy)


@pytest.mark.slow
def test_a_store_is_made_with_the_first_large_upload(
    cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer
) -> None:
    """The sessions of uploads lie in it: alone, they would look like somebody else's directory."""
    size = 70 << 20
    hasher = hashlib.sha256(bytes(size))
    image = make_image([{"x": b""}], compress=False)
    write_layout(tmp_path / "l", t=image)
    with (tmp_path / "l/blobs/sha256" / hasher.hexdigest()).open("wb") as f:
        f.truncate(size)
    document = image.document()
    document["layers"] = [{"mediaType": OCI_LAYER, "digest": f"sha256:{hasher.hexdigest()}", "size": size}]
    top = Blob(json.dumps(document).encode(), image.top.media_type)
    write_layout(tmp_path / "l", t=Image(top, image.blobs))
    cli("copy", f"oci:{tmp_path}/l:t", f"docker://{fresh_registry.host}/large:1")
    assert (cli.root / "uploads").is_dir()
    Store.open(cli.root).close()


def test_login_explained(
    cli: CommandLine, password_registry: RegistryServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each place and what it gave, the helper's own words, the registry's verdict; and no secret."""
    host = password_registry.host
    given = cli("tags", "ls", "--creds", "tester:wr0ng", f"{host}/any", status=3)
    assert "the credentials given were not accepted" in given.err
    anonymous = cli("login", "--explain", host, status=3)
    assert "is not there" in anonymous.text
    assert f"{host}: " in anonymous.text.splitlines()[-1]
    cli("login", "-u", "tester", "--password-stdin", host, stdin=b"s3cret\n")
    known = cli("login", "--explain", "--json", host).json()
    assert known["verdict"] == "accepts them"
    assert known["used"].endswith(f"auths['{host}']")
    assert known["places"][-1]["found"] == "user tester, a password"
    # The environment comes first; a wrong password in it is the registry's verdict.
    monkeypatch.setenv("PYBUILD_REGISTRY", host)
    monkeypatch.setenv("PYBUILD_REGISTRY_USER", "tester")
    monkeypatch.setenv("PYBUILD_REGISTRY_PASSWORD", "wr0ng")
    wrong = cli("login", "--explain", host, status=3)
    assert wrong.text.startswith("1. PYBUILD_REGISTRY: user tester, a password\n2. ")
    assert "not asked" in wrong.text
    cli("tags", "ls", f"{host}/any", status=3)
    monkeypatch.setenv("PYBUILD_REGISTRY_PASSWORD", "s3cret")
    cli("tags", "ls", f"{host}/any", status=4)
    for name in ("", "_USER", "_PASSWORD"):
        monkeypatch.delenv(f"PYBUILD_REGISTRY{name}")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "docker-credential-broken").write_text("#!/bin/sh\necho 'the vault is sealed' >&2\nexit 9\n")
    (programs / "docker-credential-broken").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"credHelpers": {host: "broken"}}))
    broken = cli("login", "--explain", "--authfile", config, host, status=3)
    assert f"docker-credential-broken, named in {config}, asked for {host}: failed: " in broken.text
    assert "exit code 9: the vault is sealed" in broken.text
    for done in (anonymous, wrong, broken):
        assert "s3cret" not in done.text + done.err
        assert "wr0ng" not in done.text + done.err


def test_cat(cli: CommandLine, fresh_registry: RegistryServer, tmp_path: Path) -> None:
    """A file by its path, out of a registry, a layout, the store; of an eStargz layer little more than that is read."""
    wanted = b"wanted\n" * 50
    noise = {f"usr/share/f{n}": os.urandom(40_000) for n in range(100)}
    image = make_image([{"etc/wanted": b"old", **noise}, {"etc/wanted": wanted, "other": b"o"}])
    layout = write_layout(tmp_path / "made", t=image)
    name = f"{fresh_registry.host}/team/cat"
    cli("copy", f"oci:{layout}:t", f"docker://{name}:plain")
    cli("copy", "--compression", "estargz", "--force-compression", f"oci:{layout}:t", f"docker://{name}:lazy")
    cli("pull", f"{name}:plain")
    for source in (f"oci:{layout}:t", f"docker://{name}:plain", f"docker://{name}:lazy", f"{name}:plain"):
        assert cli("cat", source, "/etc/wanted", "other").out == wanted + b"o"
    out = tmp_path / "out"
    cli("cat", "-o", out, f"docker://{name}:lazy", "usr/share/f99")
    assert out.read_bytes() == noise["usr/share/f99"]
    missing = cli("cat", "-o", tmp_path / "none", f"docker://{name}:lazy", "/etc/wanted", "/nothing", status=1)
    assert "has no file /nothing" in missing.err
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("none")]
    with FaultProxy(fresh_registry.host) as proxy:
        assert cli("cat", f"docker://{proxy.host}/team/cat:lazy", "usr/share/f42").out == noise["usr/share/f42"]
        assert proxy.down_bytes < 3 * 40_000
    # A registry that knows no ranges sends the layer whole.
    with FaultProxy(fresh_registry.host, lambda e: Fault(drop_request_headers=("range",))) as proxy:
        assert cli("cat", f"docker://{proxy.host}/team/cat:lazy", "usr/share/f42").out == noise["usr/share/f42"]
    # Chunks are checked by the digests of a table that is itself checked.
    for part in ("footer", "table", "chunk"):
        with FaultProxy(fresh_registry.host, damaging(part)) as proxy:
            done = cli("cat", f"docker://{proxy.host}/team/cat:lazy", "usr/share/f42", status=None)
            assert done.out in {b"", noise["usr/share/f42"]}, part
            assert done.status in ({0} if done.out else {1, 8}), part


def damaging(part: str) -> Callable[[Exchange], Fault | None]:
    """Change a byte of one of the parts of an eStargz blob as it passes: they are asked for by Range, in this order."""
    order: list[str] = []

    def rule(exchange: Exchange) -> Fault | None:
        if exchange.method != "GET" or "range" not in exchange.headers:
            return None
        order.append(("footer", "table", "chunk")[len(order)] if len(order) < 3 else "more")
        return Fault(corrupt_at=20) if order[-1] == part else None

    return rule


def test_the_librarys_pull_knows_short_names(tmp_path: Path, fresh_registry: RegistryServer) -> None:
    layout = write_layout(tmp_path / "made", t=make_image())
    place = f"{fresh_registry.host}/team/short"
    api.copy(f"oci:{layout}:t", place, root=tmp_path / "store", default_source="storage")
    conf = tmp_path / "registries.conf"
    conf.write_text(f'[aliases]\n"brief" = "{place}"\n')
    options = RegistryOptions(registries_conf=str(conf))
    pulled = api.pull("brief", root=tmp_path / "store", source_registry=options)
    with Store.open(tmp_path / "store") as store:
        assert store.names.get(f"{place}:latest") == pulled.descriptor
    named = api.pull("brief", root=tmp_path / "store", name="mine:1", source_registry=options)
    assert named.descriptor == pulled.descriptor
