"""Models that people already have, on fused ops: one file per family, none of which imports the package it serves."""

from .apply import Change, Report, apply, unapply

__all__ = ["Change", "Report", "apply", "unapply"]
