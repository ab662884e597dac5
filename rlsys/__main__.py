"""`python -m rlsys` is the `rlsys` command."""

from rlsys.cli import main

main()
