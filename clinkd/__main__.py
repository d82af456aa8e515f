"""`python -m clinkd` is the `clinkd` command."""

from clinkd.cli import main

main()
