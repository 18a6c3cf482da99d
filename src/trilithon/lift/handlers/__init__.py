"""All mask-lifting handlers; importing this module fills the registry. An op that is not here is refused."""

from trilithon.lift.handlers import create, floats, identity, index, logic, pointwise, scan, shape, view  # noqa: F401
from trilithon.lift.registry import HANDLERS

__all__ = ["HANDLERS"]
