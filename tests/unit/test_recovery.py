"""What a run has said so far → how another owner goes on."""

import pytest
from msgspec import Raw

from app.domain.recovery import recover
from app.wire.events import ItemAdded, ItemDone, encode_event

REASONING = Raw(b'{"type":"reasoning","id":"rs_1","summary":[],"status":"completed"}')
MESSAGE = Raw(b'{"type":"message","id":"msg_1","role":"assistant","status":"completed","content":[]}')
ADDED = {"type": "message", "id": "msg_2", "role": "assistant", "content": []}
BARE = Raw(b'{"id":"msg_2","role":"assistant","status":"completed","content":[]}')


def said(*items, last=None):
    """The entries of items that were done, and of one that was only added."""
    events = [ItemDone(output_index=index, item=item) for index, item in enumerate(items)]
    if last:
        events.append(ItemAdded(output_index=len(items), item=last))
    for number, event in enumerate(events):
        event.sequence_number = number
    return [encode_event(event) for event in events]


@pytest.mark.parametrize(
    ("items", "kept"),
    [
        ([], 0),
        ([REASONING], 0),
        ([REASONING, REASONING], 0),
        ([REASONING, MESSAGE], 2),
        ([REASONING, MESSAGE, REASONING], 2),
        ([BARE], 1),
    ],
)
def test_reasoning_at_the_end_is_made_anew_with_its_turn(items, kept):
    recovered = recover(said(*items))
    assert recovered.done == items
    assert recovered.output == items[:kept]
    assert (recovered.next_number, recovered.next_output_index) == (len(items), len(items))


def test_an_open_item_is_closed_as_incomplete_and_its_index_is_not_used_again():
    recovered = recover(said(REASONING, last={**ADDED, "status": "in_progress"}))
    (done,) = recovered.closing
    assert isinstance(done, ItemDone)
    assert b'"status":"incomplete"' in bytes(done.item)
    assert (recovered.next_number, recovered.next_output_index) == (2, 2)


def test_an_open_patch_is_closed_with_a_status_that_its_type_has():
    patch = {"type": "apply_patch_call", "id": "apc_1", "call_id": "c1", "operation": {}, "status": "in_progress"}
    (done,) = recover(said(last=patch)).closing
    assert b'"status":"in_progress"' in bytes(done.item)
