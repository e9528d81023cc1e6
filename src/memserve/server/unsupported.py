"""OpenAI and vLLM parameters that would change the answer and are not supported: accepted at their default.

The tables are the whole knowledge; a field that is in no table and no schema is ignored and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from memserve.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Values that mean "as if not given" besides null, and what to do instead of any other."""

    harmless: tuple[object, ...]
    remedy: str


_TOOLS = "describe the tools in a system message and parse the answer yourself"
_FORMAT = "ask for the format in the prompt and check the answer"
_SAMPLING = "shape the sampling with temperature, top_p or top_k"
_TEXT = "only text is understood and produced"
_REPEAT = "send one request per candidate, or use n"

_BOTH: dict[str, Unsupported] = {
    "frequency_penalty": Unsupported((0,), _SAMPLING),
    "presence_penalty": Unsupported((0,), _SAMPLING),
    "repetition_penalty": Unsupported((1,), _SAMPLING),
    "length_penalty": Unsupported((1,), _SAMPLING),
    "min_p": Unsupported((0,), _SAMPLING),
    "typical_p": Unsupported((1,), _SAMPLING),
    "logit_bias": Unsupported(({},), _SAMPLING),
    "logits_processors": Unsupported(([],), _SAMPLING),
    "allowed_token_ids": Unsupported((), _SAMPLING),
    "bad_words": Unsupported(([],), "use stop strings"),
    "min_tokens": Unsupported((0,), "use ignore_eos with max_tokens"),
    "best_of": Unsupported((1,), _REPEAT),
    "use_beam_search": Unsupported((False,), _REPEAT),
    "response_format": Unsupported(({"type": "text"},), _FORMAT),
    "structured_outputs": Unsupported((), _FORMAT),
    "guided_json": Unsupported((), _FORMAT),
    "guided_regex": Unsupported(("",), _FORMAT),
    "guided_choice": Unsupported(([],), _FORMAT),
    "guided_grammar": Unsupported(("",), _FORMAT),
    "echo": Unsupported((False,), "put the prompt in front of the answer yourself"),
    "prompt_logprobs": Unsupported((), "log probabilities are given for generated tokens only"),
    "truncate_prompt_tokens": Unsupported((), "shorten the prompt before sending it"),
    "include_stop_str_in_output": Unsupported((False,), "append the stop string yourself"),
    "skip_special_tokens": Unsupported((True,), "special tokens are never part of the text"),
    "spaces_between_special_tokens": Unsupported((True,), "special tokens are never part of the text"),
    "return_tokens_as_token_ids": Unsupported((False,), "token texts are returned"),
    "return_token_ids": Unsupported((False,), "token texts are returned"),
}
_CHAT: dict[str, Unsupported] = {
    "tools": Unsupported(([],), _TOOLS),
    "tool_choice": Unsupported(("none", "auto"), _TOOLS),
    "functions": Unsupported(([],), _TOOLS),
    "function_call": Unsupported(("none", "auto"), _TOOLS),
    "modalities": Unsupported((["text"],), _TEXT),
    "audio": Unsupported((), _TEXT),
    "web_search_options": Unsupported((), "put what the model should know into a message"),
    "documents": Unsupported(([],), "put what the model should know into a message"),
    "reasoning_effort": Unsupported(("none",), "ask for it in a message"),
    "verbosity": Unsupported(("medium",), "ask for it in a message"),
    "chat_template": Unsupported(
        (), "the model's own template is used; send /v1/completions a rendered prompt"
    ),
    "chat_template_kwargs": Unsupported(({},), "send /v1/completions a rendered prompt"),
    "add_generation_prompt": Unsupported((True,), "send /v1/completions a rendered prompt"),
    "continue_final_message": Unsupported((False,), "send /v1/completions a rendered prompt"),
    "add_special_tokens": Unsupported((False,), "send /v1/completions the token ids"),
}
_COMPLETION: dict[str, Unsupported] = {
    "suffix": Unsupported(("",), "the model cannot fill in the middle; put all context into the prompt"),
    "prompt_embeds": Unsupported((), "send text or token ids"),
    "add_special_tokens": Unsupported((True,), "send token ids"),
}

CHAT: Mapping[str, Unsupported] = _BOTH | _CHAT
COMPLETION: Mapping[str, Unsupported] = _BOTH | _COMPLETION


def reject_unsupported(fields: Mapping[str, msgspec.Raw], table: Mapping[str, Unsupported]) -> None:
    """Raise ``InvalidRequest`` for the first field of ``table`` that would change the answer."""
    for name in (name for name in fields if name in table):
        value, known = msgspec.json.decode(fields[name]), table[name]
        if value is None or any(_same(value, harmless) for harmless in known.harmless):
            continue
        raise InvalidRequest(
            f"'{name}' is not supported{_accepted(known)}. Remedy: leave it out; {known.remedy}.",
            field=name,
            code="unsupported_parameter",
        )


def _same(value: object, harmless: object) -> bool:
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)


def _accepted(known: Unsupported) -> str:
    if not known.harmless:
        return ""
    values = " or ".join(msgspec.json.encode(value).decode() for value in known.harmless)
    return f" (only {values} is accepted)"
