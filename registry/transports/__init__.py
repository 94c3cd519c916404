"""One module per transport; `registry.transport` finds them by name."""
