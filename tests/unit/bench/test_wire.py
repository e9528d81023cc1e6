"""What servers say, however it is cut into pieces and whoever says it."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.bench.records import Sources
from memserve.bench.wire import Event, EventReader, Usage, explain_error, explain_refusal
from memserve.core.errors import ProtocolError

STREAM = (
    b": a comment\r\n\r\n"
    b'data: {"id": "1", "choices": [{"index": 0, "delta": {"role": "assistant"}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "h\xc3\xa9"}, "finish_reason": null}]}\r\n\r\n'
    b'event: message\ndata:{"choices": [{"text": "llo", "finish_reason": "stop"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\n'
    b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_events_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    reader = EventReader()
    events = [event for begin, end in itertools.pairwise(edges) for event in reader.read(STREAM[begin:end])]
    assert "".join(event.text for event in events) == "héllo"
    assert [event.finished for event in events] == [False, False, True, False]
    assert events[-1].usage is not None
    assert events[-1].usage.sources == Sources(unknown=9)
    assert reader.done


def usage(details: object) -> Sources:
    body = json.dumps({"choices": [], "usage": {"prompt_tokens": 10, "prompt_tokens_details": details}})
    (event,) = EventReader().read(f"data: {body}\n".encode())
    assert isinstance(event.usage, Usage)
    return event.usage.sources


def test_sources_of_servers_with_and_without_a_ledger() -> None:
    assert usage(None) == Sources(unknown=10)
    assert usage({"cached_tokens": None}) == Sources(unknown=10)
    assert usage({"cached_tokens": 4, "audio_tokens": 0}) == Sources(computed=6, cached=4)
    ledger = {"computed": 3, "local": 4, "backflow": 3}
    assert usage({"cached_tokens": 7, "memserve": ledger}) == Sources(computed=3, local=4, backflow=3)


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no completion chunk"):
        list(EventReader().read(b"data: {nonsense\n"))


def test_refusals_in_words() -> None:
    assert explain_refusal(429, b'{"error": {"message": "full", "code": 1}}') == "status 429: full"
    assert explain_refusal(400, b'{"error": "plain words"}') == "status 400: plain words"
    assert explain_refusal(502, b"<html>") == "status 502: no message"
    (event,) = EventReader().read(b'data: {"error": {"message": "gone"}}\n')
    assert explain_error(event) == "gone"
    assert explain_error(Event()) == ""
