"""What the crash and concurrency tests run in processes of their own: a small build against a store.

`python -m tests.integration.store.worker ROOT SEED ROUNDS ACTION…` prints one line per published name,
after it was published: such a name is a promise that the tests hold the store to.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import tarfile
from pathlib import Path

from layers.errors import BlobNotFound, StoreError
from layers.image import UnpackOptions, load_image, unpack_image, write_image
from layers.oci import MEDIA_OCI_CONFIG, MEDIA_OCI_LAYER_GZIP, Descriptor, Digest, Manifest, Platform
from layers.records import LayerRecord
from layers.snapshotters.overlay import OverlaySnapshotter
from layers.store import Store


def build(store: Store, rng: random.Random, name: str) -> None:
    """Three cached steps on a shared base, their layers, a manifest, a name."""
    parent: str | None = None
    layers: list[Descriptor] = []
    for step in range(3):
        key = f"step:{rng.randrange(4) if step == 0 else rng.random()}"
        record = store.cache.get(key)
        if record is not None and record.snapshot_id is not None:
            parent = record.snapshot_id
        else:
            active = store.snapshots.prepare(parent)
            (active.path / f"file{step}").write_bytes(rng.randbytes(rng.randrange(20_000)))
            parent = store.snapshots.commit(active).id
            store.cache.put(key, parent, json.dumps({"step": step}).encode())
        blob = store.put(rng.randbytes(rng.randrange(1, 60_000)), MEDIA_OCI_LAYER_GZIP)
        store.layers.record(parent, LayerRecord(blob.digest, blob, 1))
        layers.append(blob)
    config = {"rootfs": {"type": "layers", "diff_ids": [d.digest for d in layers]}, "os": "linux"}
    manifest = Manifest.build(config=store.put(json.dumps(config).encode(), MEDIA_OCI_CONFIG), layers=layers)
    store.publish({name: store.put(manifest.raw, manifest.media_type)})


FILES = 10
"""How many files each layer of `unpack` and `pack` has."""
PACKED_KEY = "packed:"
"""What the keys of cache records begin with that lead to a snapshot of `pack`."""


def unpack(store: Store, rng: random.Random) -> None:
    """An image of real layers, some shared with other workers, pulled into snapshots."""
    tars = [layer(random.Random(rng.randrange(3) if i == 0 else rng.random()), i) for i in range(3)]
    blobs = [store.put(gzip.compress(tar, mtime=0), MEDIA_OCI_LAYER_GZIP) for tar in tars]
    document = {"os": "linux", "rootfs": {"type": "layers", "diff_ids": [Digest.of(tar) for tar in tars]}}
    image = load_image(store, write_image(store, document, blobs), Platform("linux", "amd64"))
    unpack_image(store, image, UnpackOptions(threads=2))


def pack(store: Store, rng: random.Random) -> None:
    """A packed snapshot, as a COPY that ends an image makes it; then somebody needs the files of one."""
    snapshots = store.snapshots
    assert isinstance(snapshots, OverlaySnapshotter)
    tar = layer(rng, 9)
    blob = store.put(gzip.compress(tar, mtime=0), MEDIA_OCI_LAYER_GZIP)
    made = snapshots.defer(None, LayerRecord(Digest.of(tar), blob, len(tar)), compression="gzip")
    store.cache.put(f"{PACKED_KEY}{rng.random()}", made.id, b"{}")
    found = rng.choice(store.cache.list(PACKED_KEY))
    try:
        snapshots.view(found.snapshot_id)
    except StoreError as e:
        # A prune may take it between the look-up and its use.
        if "is not in the store" not in e.message:
            raise


def layer(rng: random.Random, number: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for each in range(FILES):
            data = rng.randbytes(rng.randrange(1, 9000))
            info = tarfile.TarInfo(f"layer{number}-{each}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def run(root: Path, seed: int, rounds: int, actions: list[str]) -> None:
    """Rounds of random actions, each as its own short life of a store."""
    rng = random.Random(seed)
    for number in range(rounds):
        action = rng.choice(actions)
        with Store.open(root) as store:
            if action == "build":
                name = f"registry.example/w{seed}:{number}"
                try:
                    build(store, rng, name)
                except (BlobNotFound, StoreError) as e:
                    # A prune may take a cached snapshot between the look-up and its use; nothing else is allowed.
                    if "is not in the store" not in e.message:
                        raise
                    continue
                print(name, flush=True)
            elif action == "pull":
                data = rng.randbytes(200_000)
                expected = Descriptor.of(data, "application/octet-stream")
                with store.ingest(expected=expected, ref=f"pull:{expected.digest}") as ingest:
                    ingest.write(data[:100_000])
                with store.ingest(expected=expected, ref=f"pull:{expected.digest}") as ingest:
                    ingest.write(data[ingest.offset :])
                    ingest.commit()
            elif action == "unpack":
                unpack(store, rng)
            elif action == "pack":
                pack(store, rng)
            elif action == "gc":
                store.gc()
            elif action == "prune":
                store.prune(all=True)
            elif action == "untag":
                mine = [n.name for n in store.names.list() if n.name.startswith(f"registry.example/w{seed}:")]
                if mine:
                    gone = rng.choice(mine)
                    print(f"-{gone}", flush=True)
                    store.names.delete(gone)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
