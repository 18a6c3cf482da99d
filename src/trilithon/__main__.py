"""`python -m trilithon`."""

from trilithon.cli import main

main()
