"""`python -m dbes.cli` is `dbes`."""

from dbes.cli import main

main()
