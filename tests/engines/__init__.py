"""Reprise in front of real engines: `make engines` runs every feature on each and writes the table to docs/engines.md."""

MODEL = "random"
"""The tiny model's name, with both engines."""

CONTEXT_TOKENS = 4096
