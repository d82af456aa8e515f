"""Groups of commands that `clinkd.cli` mounts."""
