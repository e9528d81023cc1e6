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
    assert (
        render("{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':')) }}")
        == '{"a":"é","b":1}'
    )
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


# The constructs of the templates that Qwen3 and Llama 3.x come with, without their texts.
QWEN3_LIKE = """
{%- if tools %}{{- 'tools!' }}{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.reasoning_content is string %}{{- 'thought!' }}
    {%- elif message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- if message.tool_calls %}{{- 'calls!' }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- 'silent!' }}{%- endif %}
{%- endif %}"""
LLAMA3_LIKE = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}{{- "tools!" }}{%- endif %}
{{- "Today: " + date_string|length|string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim
            + '<|eot_id|>' }}
    {%- elif message.tool_calls|length != 1 %}
        {{- raise_exception("This model only supports single tool-calls at once!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
TALK = (
    ChatMessage("system", " Be brief. "),
    ChatMessage("user", "hi"),
    ChatMessage("assistant", "<think>hm</think>\n\nhello"),
    ChatMessage("user", "bye"),
)


def test_templates_like_qwen3s() -> None:
    turns = ["system\n Be brief. ", "user\nhi", "assistant\nhello", "user\nbye"]
    expected = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    assert render(QWEN3_LIKE, *TALK) == expected
    assert render(QWEN3_LIKE, *TALK, prompt=True) == expected + "<|im_start|>assistant\n"


def test_templates_like_llama3s() -> None:
    turns = [
        ("system", "Today: 11\n\nBe brief."),
        ("user", "hi"),
        ("assistant", "<think>hm</think>\n\nhello"),
        ("user", "bye"),
    ]
    expected = "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns
    )
    assert render(LLAMA3_LIKE, *TALK) == "<s>" + expected
    assert render(LLAMA3_LIKE, *TALK, prompt=True).endswith(
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
