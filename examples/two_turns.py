"""Two turns of a chat against a running server; shows how much of the second turn was cached.

python examples/two_turns.py [http://127.0.0.1:8000]
"""

from __future__ import annotations

import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

MODEL = "smollm2-135m"


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    messages: list[ChatCompletionMessageParam] = []
    for question in ("Why is the sky blue?", "Say it again for a child."):
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=60, temperature=0)
        text = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens
        print(f"> {question}\n{text}\n[{cached} of {answer.usage.prompt_tokens} prompt tokens were cached]\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
