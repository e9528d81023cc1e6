"""How true the prompt trees were: what decisions believed to be cached, against what was found. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TreeAccuracy:
    """Sums over all requests that have got their first token, in tokens of their prompts.

    believed : were believed to be cached, or to be so soon, where the prompt was prefilled.
    promised : those among them that rested on a promise alone.
    stale : were believed and not found: computed although the decision counted on them.
    missed : were found and not believed: the decision might have been another.
    """

    requests: int = 0
    prompt: int = 0
    believed: int = 0
    promised: int = 0
    stale: int = 0
    missed: int = 0

    def learn(self, prompt: int, believed: int, promised: int, found: int) -> None:
        """One request of ``prompt`` tokens; the last of them is always computed."""
        believed, found = min(believed, prompt - 1), min(found, prompt - 1)
        self.requests += 1
        self.prompt += prompt
        self.believed += believed
        self.promised += min(promised, believed)
        self.stale += max(0, believed - found)
        self.missed += max(0, found - believed)

    @property
    def stale_rate(self) -> float:
        """Share of what was believed that was not there."""
        return self.stale / self.believed if self.believed else 0.0
