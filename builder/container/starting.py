"""What starts a container's sandboxes. It is made first of all, with few imports: it prepares while others come."""

from __future__ import annotations

from builder.sandbox.launcher import Launcher, compiled_filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from builder.sandbox.spec import SandboxSpec


class ContainerLauncher(Launcher):
    """Launches one container, time and again: see `Launcher`. `root` is the store's."""

    accounting = True
    root: Path | None = None

    def filter_of(self, spec: SandboxSpec) -> bytes | None:
        """See `Launcher.filter_of`; the default one is kept in the store."""
        if self.root is None or spec.privileged or spec.seccomp != "default":
            return compiled_filter(spec)
        from builder.container import filters

        return filters.program(self.root, spec.capabilities, lambda: compiled_filter(spec))


def start_launcher(runtime: str | None, network: str = "host", *, own_pids: bool = True) -> Launcher:
    """What starts containers with this network: of namespaces, or of a runtime (its path). Raises: SandboxError."""
    if runtime is None:
        return ContainerLauncher.start(network, own_pids=own_pids)
    from builder.sandbox import oci

    return oci.start(runtime)
