"""Reprise: a persistent, stateful Responses API server in front of any Chat Completions upstream."""
