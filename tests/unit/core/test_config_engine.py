"""The engine's part of the configuration: speculation is off, and asked for in vLLM's words."""

from __future__ import annotations

import pytest

from memserve.core.config import parse_config
from memserve.core.errors import ConfigError
from memserve.engine.assembly import build_batcher
from memserve.engine.speculation import Lookup


def test_speculation_is_asked_for() -> None:
    assert build_batcher(parse_config("").engine).lookup is None
    wanted = "speculative_method = 'ngram'\nnum_speculative_tokens = 3"
    engine = parse_config(f"[engine]\n{wanted}\nprompt_lookup_max = 4\nprompt_lookup_min = 2").engine
    assert build_batcher(engine).lookup == Lookup(3, longest=4, shortest=2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("speculative_method = 'eagle'", "engine.speculative_method is 'eagle'; accepted: one of off, ngram"),
        ("num_speculative_tokens = 17", "engine.num_speculative_tokens"),
        ("prompt_lookup_max = 0", "engine.prompt_lookup_max"),
        ("prompt_lookup_max = 2\nprompt_lookup_min = 3", "engine.prompt_lookup_min is 3"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(f"[engine]\n{text}")
