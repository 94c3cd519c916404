"""The drivers behind `layers.snapshot.Snapshotter`: overlay (kernel overlayfs), native (reflink or copy)."""
