"""From a Containerfile to a graph of steps; pure but for a Resolver."""
