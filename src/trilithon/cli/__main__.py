"""`python -m trilithon.cli`."""

from trilithon.cli import main

main()
