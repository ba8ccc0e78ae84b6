"""Reprise: a persistent, stateful Responses API server in front of any Chat Completions upstream."""

__version__ = "0.1.0"
