"""Stop strings across chunk borders, against a brute-force oracle."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from memserve.core.types import TokenLogprob
from memserve.server.text import TextStream, find_stop, held_back


class Letters:
    """Token n is the n-th letter; 99 is half of a character that 98 completes."""

    def __init__(self) -> None:
        self._half = False

    def push(self, tokens: Sequence[int]) -> str:
        text = ""
        for token in tokens:
            if token == 99:
                self._half = True
            elif token == 98:
                text, self._half = text + "é", False
            else:
                text += "abcdefgh"[token]
        return text

    def flush(self) -> str:
        return "\ufffd" if self._half else ""


def expected(text: str, stop: Sequence[str]) -> tuple[str, int, bool]:
    """What must be shown of ``text`` sampled letter by letter, and how many letters that takes."""
    for read in range(1, len(text) + 1):
        cut = find_stop(text[:read], stop)
        if cut is not None:
            return text[:cut], read, True
    return text, len(text), False


letters = st.text("abc", max_size=40)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@given(letters, stops, st.integers(1, 7))
def test_shows_exactly_what_comes_before_the_first_stop_string(text: str, stop: list[str], size: int) -> None:
    tokens = ["abcdefgh".index(char) for char in text]
    stream, shown, released = TextStream(Letters(), stop), "", []
    for start in range(0, len(tokens), size):
        step = stream.push(tokens[start : start + size])
        shown += step.text
        released += step.tokens
        if not step.stopped:
            assert find_stop(shown, stop) is None
            assert held_back(shown + text[len(shown) : start + size], stop) == len(
                text[: start + size]
            ) - len(shown)
        if stream.stopped:
            break
    if not stream.stopped:
        last = stream.finish()
        shown += last.text
        released += last.tokens
    assert (shown, stream.tokens_read, stream.stopped) == expected(text, stop)
    assert [(entry.token, entry.offset) for entry in released] == [
        (token, at) for at, token in enumerate(tokens[: len(shown)])
    ]


def test_nothing_after_a_stop_string_in_the_same_chunk_is_counted() -> None:
    stream = TextStream(Letters(), ["bc"])
    step = stream.push([0, 1, 2, 3, 4])
    assert (step.text, step.stopped, stream.tokens_read) == ("a", True, 3)


def test_held_back_text_is_released_when_it_turns_out_otherwise() -> None:
    stream = TextStream(Letters(), ["abc"])
    assert stream.push([0, 1]).text == ""
    assert stream.push([3]).text == "abd"


def test_an_incomplete_character_becomes_a_replacement_at_the_end() -> None:
    stream = TextStream(Letters(), [])
    assert stream.push([0, 99]).text == "a"
    last = stream.finish()
    assert last.text == "\ufffd"
    assert [entry.offset for entry in last.tokens] == [1]


def test_a_character_of_two_tokens_releases_both_with_its_text() -> None:
    stream = TextStream(Letters(), [])
    assert stream.push([99]) == stream.push([])
    step = stream.push([98])
    assert step.text == "é"
    assert [(entry.token, entry.offset) for entry in step.tokens] == [(99, 0), (98, 0)]


def test_logprobs_stay_with_their_tokens() -> None:
    stream = TextStream(Letters(), ["b"])
    first, second = TokenLogprob(0, -0.5), TokenLogprob(1, -1.5)
    step = stream.push([0, 1], [first, second])
    assert [entry.logprob for entry in step.tokens] == [first]


def test_a_stop_string_completed_by_the_flush_is_not_shown() -> None:
    stream = TextStream(Letters(), ["a\ufffd"])
    assert stream.push([0, 99]).text == ""
    assert stream.finish().text == ""
    assert stream.stopped
