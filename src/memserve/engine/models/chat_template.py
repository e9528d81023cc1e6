"""Renders chat messages to the text a model was trained on. Sandboxed: a template comes with the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

import jinja2
import msgspec
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from memserve.core.errors import InvalidRequest, ModelError
from memserve.engine.models.tokenizer import reject_surrogates

# What template code can make Python raise on odd messages, besides jinja2's own errors.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn: who speaks (``system``, ``user``, ``assistant``, ...) and what is said."""

    role: str
    content: str
    name: str | None = None


class ChatTemplate:
    """A compiled jinja2 chat template, with the functions that templates expect (as in transformers).

    Raises ``ModelError`` if the source is not a valid template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template is not valid: {error}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """The prompt's text, special tokens written out.

        Raises ``InvalidRequest`` (field ``messages``) for what the template refuses.
        """
        for message in messages:
            reject_surrogates(message.content, field="messages")
        try:
            return self._template.render(
                messages=[msgspec.to_builtins(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequest(
                f"messages do not fit the model's chat template: {error}", field="messages"
            ) from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which models have not been trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().astimezone().strftime(format)
