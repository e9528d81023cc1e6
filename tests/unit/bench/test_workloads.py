"""What recorded data become: seeds, causality, proportions kept, nothing longer than the context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memserve.bench.content import Run, Text, render_text, render_tokens
from memserve.bench.conversations import (
    Document,
    Exchange,
    Making,
    Step,
    Trajectory,
    make_agents,
    make_chats,
    make_documents,
)
from memserve.bench.fitting import CharacterRuler, common_factor, scale_lengths
from memserve.bench.sources import Recorded, read_replay, read_workload
from memserve.bench.synthetic import Shape, make_synthetic
from memserve.bench.trace import TraceLine, make_replay, parse_trace
from memserve.bench.workload import Workload, compose_prompt, salt_workload
from memserve.core.errors import ConfigError

RULER = CharacterRuler(1.0)
"""A token per character, so that sums are exact."""


def longest(workload: Workload) -> int:
    """Tokens of the longest prompt and answer together, without what a chat template adds."""
    sums = []
    for session in salt_workload(workload, "x").sessions:
        for at, turn in enumerate(session.turns):
            prompt = compose_prompt(workload, session, [one.reply for one in session.turns[:at]])
            sums.append(sum(count(piece) for one in prompt for piece in one.content) + turn.max_tokens)
    return max(sums)


def count(piece: Text | Run) -> int:
    return RULER.count(piece.text) if isinstance(piece, Text) else piece.tokens


def exchange(asked: int, reply: int, mark: str = "x") -> Exchange:
    return Exchange(mark * asked, mark * reply)


# --- cutting ------------------------------------------------------------------------------------------


def test_lengths_that_fit_stay_and_others_keep_their_ratios() -> None:
    assert scale_lengths([10, 20, 30], 60, [1, 1, 1]) == [10, 20, 30]
    assert scale_lengths([100, 200, 300], 60, [1, 1, 1]) == [10, 20, 30]


def test_lengths_keep_their_least_at_the_others_cost() -> None:
    scaled = scale_lengths([1000, 10, 4], 110, [0, 8, 4])
    assert scaled[1:] == [8, 4]
    assert sum(scaled) <= 110
    # What is shorter than its least is not made longer.
    assert scale_lengths([1000, 3], 100, [0, 8]) == [97, 3]


def test_one_factor_makes_most_sessions_fit() -> None:
    assert common_factor([100] * 9 + [10_000], 50) == pytest.approx(50 / 1090)
    assert common_factor([10, 20], 50) == 1.0
    assert common_factor([], 50) == 1.0


# --- chats --------------------------------------------------------------------------------------------


def test_chats_keep_turns_and_the_ratio_of_prompt_to_answer() -> None:
    chat = [exchange(400, 800), exchange(200, 600), exchange(400, 1600)]
    workload = make_chats([chat], Making(RULER, 1, 1024, 0))
    (session,) = workload.sessions
    lengths = [(len(render_text(turn.asked[0].content)), turn.max_tokens) for turn in session.turns]
    factor = lengths[0][0] / 400
    assert 0.2 < factor < 0.25
    for (asked, answered), was in zip(lengths, chat, strict=True):
        assert asked == pytest.approx(len(was.asked) * factor, abs=1.5)
        assert answered == pytest.approx(len(was.reply) * factor, abs=1.5)
    assert longest(workload) <= 1024


def test_short_chats_stay_as_they_were() -> None:
    (session,) = make_chats([[exchange(20, 30)]], Making(RULER, 1, 1024, 0)).sessions
    assert render_text(session.turns[0].asked[0].content) == "x" * 20
    assert session.turns[0].max_tokens == 30


def test_the_seed_decides_order_and_pauses() -> None:
    chats = [[exchange(10, 10, mark), exchange(10, 10, mark)] for mark in "abcdefgh"]
    first, again, other = (make_chats(chats, Making(RULER, 8, 1024, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {render_text(one.turns[0].asked[0].content)[0] for one in other.sessions} == set("abcdefgh")
    assert first.sessions[0].turns[0].think == 0
    assert first.sessions[0].turns[1].think > 0
    (bare,) = make_chats(chats, Making(RULER, 1, 1024, 1, think=0.0)).sessions
    assert bare.turns[1].think == 0


# --- documents ----------------------------------------------------------------------------------------


def make_paper(tokens: int = 10_000) -> Document:
    text = "".join(f"{at:05d} " for at in range(tokens // 6))
    return Document(text, (exchange(40, 60, "q"), exchange(100, 20, "r")))


TEMPLATE = "Read. {input}\nQuestion: {Q}\nAnswer: "


def test_questions_share_their_document_and_ratios_are_kept() -> None:
    document = make_paper()
    workload = make_documents([document], TEMPLATE, Making(RULER, 1, 2048, 0))
    (session,) = workload.sessions
    assert longest(workload) <= 2048
    kept = len(render_text(session.opening[0].content)) - len("Read. ")
    assert kept > 1700
    factor = kept / len(document.text)
    assert session.turns[1].max_tokens == 4
    assert session.turns[0].max_tokens == pytest.approx(60 * factor, abs=1)
    first, second = (compose_prompt(workload, session, answers) for answers in ((), ((),)))
    begin = render_text(session.opening[0].content)
    for prompt, mark in ((first, "q"), (second, "r")):
        text = render_text(prompt[0].content)
        assert text.startswith(begin)
        assert text.removeprefix(begin).startswith(f"\nQuestion: {mark}")


def test_more_sessions_read_other_windows_and_then_the_same_again() -> None:
    workload = make_documents([make_paper()], TEMPLATE, Making(RULER, 12, 2048, 0))
    openings = [render_text(session.opening[0].content) for session in workload.sessions]
    windows = len(set(openings))
    assert 3 <= windows < 12
    assert openings[:windows] == list(dict.fromkeys(openings))
    assert openings[windows] == openings[0]


# --- agents -------------------------------------------------------------------------------------------


def test_agents_share_their_prefix_and_their_context_grows() -> None:
    steps = (Step("think", "Search[x]", "o" * 300), Step("done", "Finish[y]", "right"))
    ways = [Trajectory(f"question {at}", steps) for at in range(5)]
    workload = make_agents(ways, "p" * 3000, Making(RULER, 5, 2048, 0))
    assert longest(workload) <= 2048
    openings = {session.opening for session in workload.sessions}
    assert len(openings) == 1
    share = len(render_text(openings.pop()[0].content)) / 2048
    assert share == pytest.approx(3000 / (3000 + 400), abs=0.07)
    session = workload.sessions[0]
    second = compose_prompt(workload, session, [(Text(" MINE"),)])
    text = "".join(render_text(one.content) for one in second)
    assert text.startswith("p" * 1500)
    assert " MINE\nObservation 1: ooo" in text


# --- synthetic ----------------------------------------------------------------------------------------


def test_synthetic_sessions_share_what_they_should() -> None:
    shape = Shape(sessions=3, turns=2, prompt=400, shared=0.25)
    workload = make_synthetic(shape, 2048, 5)
    texts = [
        render_text((*one.opening[0].content, *one.turns[0].asked[0].content)) for one in workload.sessions
    ]
    words = [text.split() for text in texts]
    assert words[0][:100] == words[1][:100]
    assert words[0][100:110] != words[1][100:110]
    assert all(380 <= len(one) <= 410 for one in words)
    assert workload == make_synthetic(shape, 2048, 5)
    assert workload != make_synthetic(shape, 2048, 6)
    assert all(48 <= turn.max_tokens <= 80 for one in workload.sessions for turn in one.turns)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (Shape(sessions=0), "--sessions is 0"),
        (Shape(turns=0), "--turns is 0"),
        (Shape(output=0), "--output-tokens is 0"),
        (Shape(shared=1.5), "--shared is 1.5"),
        (Shape(prompt=4), "--prompt-tokens is 4"),
        (Shape(turns=100), "grows to"),
    ],
)
def test_senseless_shapes_are_named(shape: Shape, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_synthetic(shape, 2048, 0)


# --- traces -------------------------------------------------------------------------------------------


def test_a_replay_keeps_lengths_prefixes_and_arrivals() -> None:
    lines = [
        TraceLine(1000, 1000, 50, [0, 1]),
        TraceLine(3500, 1500, 60, [0, 1, 2]),
        TraceLine(3500, 600, 5, [0, 7]),
    ]
    workload = make_replay(lines, 4096)
    assert [session.arrival for session in workload.sessions] == [0.0, 2.5, 2.5]
    prompts = [render_tokens(session.turns[0].asked[0].content, 49152) or [] for session in workload.sessions]
    assert [len(prompt) for prompt in prompts] == [1000, 1500, 600]
    assert [session.turns[0].max_tokens for session in workload.sessions] == [50, 60, 5]
    assert prompts[0] == prompts[1][:1000]
    assert prompts[0][:512] == prompts[2][:512]
    assert prompts[0][512] != prompts[2][512]


def test_a_cut_replay_keeps_proportions() -> None:
    lines = [TraceLine(at, 5120 * (1 + at % 3), 512, list(range(10 * (1 + at % 3)))) for at in range(30)]
    workload = make_replay(lines, 2048)
    lengths = [sum(count(piece) for piece in one.turns[0].asked[0].content) for one in workload.sessions]
    assert lengths[1] == 2 * lengths[0]
    assert lengths[2] == pytest.approx(3 * lengths[0], abs=60)
    assert longest(workload) <= 2048
    # Ten ids are a third of thirty, in the trace and after cutting.
    prompts = [render_tokens(one.turns[0].asked[0].content, 1000) or [] for one in workload.sessions[:3]]
    assert prompts[2][: lengths[1]] == prompts[1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "line 1"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', "2 hash_ids"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}', "input_length 0"),
        ("\n\n", "no requests"),
    ],
)
def test_bad_traces_are_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_trace(text.split("\n"), "x.jsonl")


# --- files --------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The three data sets in small, as their files have them."""
    said = [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "hi, what is it?"}]
    chats = [{"id": "a", "conversations": [*said, *said]}, {"id": "b", "conversations": said[1:]}]
    paper = {"input": "word " * 3000, "title": "t", "qa_pairs": str([{"Q": "why?", "A": 3, "S": ["x"]}])}
    shots = {"instruction": "Solve. ", "webthink_simple6": "Question: example " * 40, "other": "x"}
    way = {"id": 0, "question": "who?", "steps": [{"thought": "t", "action": "a", "observation": "o"}]}
    for name, text in (
        ("sharegpt/conversations.json", json.dumps(chats)),
        ("loogle/task2prompt.json", json.dumps({"longdep_qa": TEMPLATE})),
        ("loogle/longdep_qa.jsonl", json.dumps(paper) + "\n"),
        ("loogle/shortdep_qa.jsonl", json.dumps(paper) + "\n"),
        ("react/react_prompt.json", json.dumps(shots)),
        ("react/trajectories.jsonl", json.dumps(way) + "\n"),
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


@pytest.mark.parametrize(("name", "turns"), [("sharegpt", 2), ("loogle", 1), ("react", 1)])
def test_data_sets_are_read_from_their_files(data: Path, name: str, turns: int) -> None:
    workload = read_workload(Recorded(name, data, 3, 1024, 0))
    assert workload.name == name
    assert [len(session.turns) for session in workload.sessions] == [turns] * 3


def test_files_that_are_missing_or_broken_are_named(data: Path) -> None:
    with pytest.raises(ConfigError, match="--workload is 'nothing'"):
        read_workload(Recorded("nothing", data, 1, 1024, 0))
    with pytest.raises(ConfigError, match="--context is 16"):
        read_workload(Recorded("react", data, 1, 16, 0))
    (data / "loogle/longdep_qa.jsonl").write_text('{"input": "x", "qa_pairs": "__import__(\'os\')"}\n')
    with pytest.raises(ConfigError, match="qa_pairs"):
        read_workload(Recorded("loogle", data, 1, 1024, 0))
    (data / "react/react_prompt.json").write_text("[]")
    with pytest.raises(ConfigError, match="react_prompt"):
        read_workload(Recorded("react", data, 1, 1024, 0))
    (data / "sharegpt/conversations.json").unlink()
    with pytest.raises(ConfigError, match=r"conversations\.json cannot be read"):
        read_workload(Recorded("sharegpt", data, 1, 1024, 0))


def test_a_trace_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    line = '{"timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [0, 1]}\n'
    file.write_text(line * 3)
    assert read_replay(file, 2, 2048).turns == 2
