"""`truncation: auto`: where a context may begin that is too long for the model.

Whole turns are dropped, oldest first. A turn begins with a message of the user and ends before the next one, so it has the calls that
the model made, their outputs, and its reasoning with what that led to. A call that is answered in a later turn stays with its output:
both turns are dropped, or none. Instructions, and the compaction item that stands for what is older, stay.
"""

from collections.abc import Sequence
from itertools import accumulate

from msgspec.structs import replace

from app.domain.compaction import (
    context_tokens,
    estimated_tokens,
    is_compaction,
    is_from_user,
    is_instruction,
    newest_compaction,
)
from app.domain.context import Context
from app.wire.items import AnyItem
from app.wire.requests import CreateResponse

BYTES_PER_TOKEN_MIN = 2
"""Of a chat request: what has fewer bytes for each token of the model's context fits into it, most likely."""


def truncated(context: Context, start: int) -> Context:
    """The context from this position on, with what stays of what precedes it; all of it if a compaction item stands after this
    position."""
    if start <= newest_compaction(context.items):
        return context
    kept = [(at, item) for at, item in context.visible if at >= start or _stays(item)]
    answers = {place: context.answers[at] for place, (at, _) in enumerate(kept) if at in context.answers}
    return replace(context, items=tuple(item for _, item in kept), answers=answers)


def starts(context: Context) -> list[int]:
    """The positions at which the context may begin, in order."""
    visible = context.visible
    answered = _answered_later(context, visible)
    found: list[int] = []
    droppable, after_user = False, False
    for place, (at, item) in enumerate(visible):
        if _stays(item):
            continue
        if is_from_user(item) and droppable and not after_user and not answered[place]:
            found.append(at)
        droppable, after_user = True, is_from_user(item)
    return found


def _answered_later(context: Context, visible: Sequence[tuple[int, AnyItem]]) -> list[int]:
    """For each place how many of the calls before it are answered at it or after it."""
    places = {id(item): place for place, (_, item) in enumerate(visible)}
    changes = [0] * (len(visible) + 1)
    for place, (at, _) in enumerate(visible):
        answer = places.get(id(context.answers.get(at)), -1)
        if answer > place:
            changes[place + 1] += 1
            changes[answer + 1] -= 1
    return list(accumulate(changes))


def later_start(request: CreateResponse, context: Context, start: int, share: float | None) -> int | None:
    """The first position after `start` that leaves out this share of the prompt, or else the last possible one; None if there is
    none. An unknown share is half of what can be left out. Tokens are estimated."""
    possible = [at for at in starts(context) if at > start]
    if not possible:
        return None
    left_out: dict[int, int] = {}
    dropped, whole = 0, context_tokens(request, ())
    for at, item in context.visible:
        if at < start and not _stays(item):
            continue
        tokens = estimated_tokens([item])
        whole += tokens
        if not _stays(item):
            left_out[at] = dropped
            dropped += tokens
    wanted = left_out[possible[-1]] / 2 if share is None else share * whole
    return next((at for at in possible if left_out[at] >= wanted), possible[-1])


def estimated_prompt(request: CreateResponse, context: Context) -> int:
    """The tokens of a prompt that nothing has counted."""
    return context_tokens(request, [item for _, item in context.visible])


def _stays(item: AnyItem) -> bool:
    return is_instruction(item) or is_compaction(item)
