"""What Postgres says, and whether the statement may be stored all the same."""

import asyncpg
import pytest

from app.errors import OutcomeUnknown
from app.storage.database import _is_outage, _unavailable


def postgres(sqlstate: str) -> asyncpg.PostgresError:
    """The error with this SQLSTATE."""
    error = asyncpg.PostgresError("no")
    error.sqlstate = sqlstate
    return error


@pytest.mark.parametrize("sqlstate", ["08006", "40003", "57P01", "XX000"])
def test_what_comes_in_the_place_of_an_answer_leaves_the_outcome_open(sqlstate):
    error = postgres(sqlstate)
    assert _is_outage(error)
    assert isinstance(_unavailable(error), OutcomeUnknown)


@pytest.mark.parametrize("sqlstate", ["25006", "40001", "40P01", "53100", "55P03", "57014", "58030"])
def test_what_postgres_refuses_for_now_is_not_stored(sqlstate):
    error = postgres(sqlstate)
    assert _is_outage(error)
    assert not isinstance(_unavailable(error), OutcomeUnknown)


@pytest.mark.parametrize("sqlstate", ["22P05", "23505", "42601"])
def test_what_is_wrong_with_a_statement_is_no_outage(sqlstate):
    assert not _is_outage(postgres(sqlstate))
