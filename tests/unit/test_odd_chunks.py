"""Chunks whose JSON has other types than the API's: they mean something, or are refused as no chunk."""

import json
from typing import Any

import msgspec
import pytest

from app.wire.odd_chunks import LEAST_LOGPROB, read_chunk, read_models


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan"), None, "x", []], ids=range(7))
def test_a_log_probability_that_is_no_number_is_the_least(value: Any):
    token = {"token": "a", "logprob": value, "bytes": [10**30], "top_logprobs": None}
    data = json.dumps({"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]})
    chunk = read_chunk(data.encode())
    assert chunk.choices and chunk.choices.first and chunk.choices.first.logprobs
    [read] = chunk.choices.first.logprobs.content or []
    assert (read.logprob, read.bytes) == (LEAST_LOGPROB, None)
    assert msgspec.json.encode(read)


@pytest.mark.parametrize("kind", [[], {}, None, 1])
def test_a_part_of_an_odd_type_is_text(kind: Any):
    data = json.dumps({"choices": [{"delta": {"content": [{"type": kind, "text": "a"}]}}]})
    chunk = read_chunk(data.encode())
    assert chunk.choices and chunk.choices.first and chunk.choices.first.delta
    assert chunk.choices.first.delta.content == "a"


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"max_model_len": 4096}, 4096),
        ({"context_window": "8192"}, 8192),
        ({"context_length": 0, "max_context_length": 2048}, 2048),
        ({"meta": {"n_ctx": 512, "n_ctx_train": 32768}}, 512),
        ({"meta": {"n_ctx_train": 32768}}, 32768),
        ({"max_model_len": -1}, None),
        ({"max_model_len": []}, None),
        ({"meta": "x"}, None),
        ({}, None),
    ],
)
def test_a_listed_model_has_the_size_of_its_context_under_many_names(given: dict[str, Any], size: int | None):
    [model] = read_models(json.dumps({"data": [{"id": "m", **given}]}).encode())
    assert model.context_window == size
