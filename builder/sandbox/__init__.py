"""One process in Linux namespaces on a root file system."""
