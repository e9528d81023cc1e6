"""Chat templates: what transformers offers them is there, the sandbox holds, and errors are the caller's."""

from __future__ import annotations

import pytest

from memserve.core.errors import InvalidRequest, ModelError
from memserve.engine.models.chat_template import ChatMessage, ChatTemplate

USER = ChatMessage("user", "hello")


def render(source: str, *messages: ChatMessage, prompt: bool = False) -> str:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    return template.render(messages or (USER,), add_generation_prompt=prompt)


def test_renders_messages_and_tokens() -> None:
    source = (
        "{{ bos_token }}\n"
        "{% for message in messages %}\n"
        "    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "[{{ message['role'] }}] {{ message.content }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    many = [ChatMessage("user", str(number)) for number in range(4)]
    text = render(source, *many, prompt=True)
    assert text == "<s>\n[user] 0</s>\n[user] 1</s>\n[assistant]"


def test_offers_what_templates_expect() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hello"}]'
    assert render("{{ '<é>' | tojson }}") == '"<é>"'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert render("{{ messages[0].name }}", ChatMessage("user", "x", name="Ann")) == "Ann"
    assert render("{{ messages[0].name is defined }}") == "False"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_what_a_template_refuses_is_the_callers_fault(source: str) -> None:
    with pytest.raises(InvalidRequest, match="do not fit the model's chat template") as caught:
        render(source)
    assert caught.value.field == "messages"


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D83D at character 1") as caught:
        render("{{ messages[0].content }}", ChatMessage("user", "x\ud83d"))
    assert caught.value.field == "messages"


def test_a_broken_template_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="chat template is not valid"):
        ChatTemplate("{% for %}")
