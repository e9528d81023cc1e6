"""A deterministic backend without a cluster, for tests and examples: scripted answers, failures, stalls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from memserve.core.errors import InvalidRequest, MemServeError
from memserve.core.messages import TierName, Trace
from memserve.core.types import FinishReason, InstanceId, Ledger, RequestId, Role, TokenLogprob, Tokens
from memserve.scheduler.decision import Decision
from memserve.scheduler.history import Explanation
from memserve.server.backend import (
    ClusterView,
    Generated,
    GenerationRequest,
    Health,
    InstanceView,
    LineView,
    StateCount,
    TierSize,
    TreeView,
)

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Script:
    """How the stand-in answers.

    ``reply``: token ids, after which the first stop token ends the answer; None repeats the prompt for
    ever. ``chunk_tokens``: tokens per chunk. After ``fail_after`` tokens ``failure`` is raised; after
    ``stall_after`` tokens nothing more comes until the request is cancelled.
    """

    reply: tuple[int, ...] | None = None
    chunk_tokens: int = 1
    failure: MemServeError | None = None
    fail_after: int = 0
    stall_after: int | None = None


@dataclass(slots=True)
class StandInBackend:
    """Implements :class:`memserve.server.backend.Backend`; what happened can be read from its fields.

    Prompts are remembered per salt in whole blocks, so that a repeated one has cached tokens in its
    ledger, as with a real cluster.
    """

    script: Script = field(default_factory=Script)
    state: Health = field(default_factory=lambda: Health("ok", "ready", (StateCount("ready", 1),)))
    requests: list[GenerationRequest] = field(default_factory=list)
    running: set[RequestId] = field(default_factory=set)
    stopped: set[RequestId] = field(default_factory=set)
    cancelled: set[RequestId] = field(default_factory=set)
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    role: Role = Role.COLOCATED
    line: LineView = field(default_factory=LineView)
    _prompts: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generated, None]:
        """Answer as the script says."""
        self.requests.append(request)
        self.running.add(request.request)
        finished = False
        try:
            async for chunk in self._answer(request):
                finished = chunk.finish is not None
                yield chunk
        finally:
            self.running.discard(request.request)
            if not finished and request.request not in self.stopped:
                self.cancelled.add(request.request)
            self.ended.set()

    def stop(self, request: RequestId) -> None:
        self.stopped.add(request)

    def health(self) -> Health:
        return self.state

    async def cluster(self) -> ClusterView:
        return ClusterView(
            model="stand-in",
            policy="round-robin",
            phases="colocated",
            block_tokens=BLOCK_TOKENS,
            block_bytes=BLOCK_TOKENS,
            instances=(InstanceView("stand-in-0", self.role, "ready", 1, 0, running=len(self.running)),),
            trees=(
                TreeView(
                    "colocated",
                    len(self._prompts),
                    sum(len(p) for _, p in self._prompts),
                    memory=4096,
                    stale_tokens=16,
                ),
            ),
            line=self.line,
        )

    async def resize(self, instance: str, tier: TierName, memory: int) -> TierSize:
        _require_known(instance)
        blocks = memory // BLOCK_TOKENS
        return TierSize(tier, blocks, blocks * BLOCK_TOKENS, 0)

    async def set_role(self, instance: str, role: Role) -> Role:
        _require_known(instance)
        before, self.role = self.role, role
        return before

    def decisions(self, request: RequestId) -> tuple[Decision, ...]:
        return tuple(_decision(earlier) for earlier in self.requests if earlier.request == request)

    def why(self, request: RequestId) -> tuple[Explanation, ...]:
        return tuple(Explanation(each, (), (), None) for each in self.decisions(request))

    def trace(self, request: RequestId) -> tuple[Trace, ...]:
        traced = any(earlier.request == request and earlier.trace for earlier in self.requests)
        rooms = ("server.accept", "server.finish") if traced else ()
        return tuple(
            Trace(request, InstanceId("server"), room, "", float(at)) for at, room in enumerate(rooms)
        )

    async def _answer(self, request: GenerationRequest) -> AsyncGenerator[Generated, None]:
        script, sampling = self.script, request.sampling
        answer, finish = _plan_answer(script.reply, request)
        ledger: Ledger | None = self._take_ledger(request.salt, request.tokens)
        for start in range(0, len(answer), script.chunk_tokens):
            await self._obey(start)
            tokens = answer[start : start + script.chunk_tokens]
            last = start + len(tokens) == len(answer)
            logprobs = () if sampling.logprobs is None else _logprobs(tokens, sampling.logprobs)
            yield Generated(tokens, logprobs, finish if last else None, ledger)
            ledger = None

    async def _obey(self, sampled: int) -> None:
        script = self.script
        if script.failure is not None and sampled >= script.fail_after:
            raise script.failure
        if script.stall_after is not None and sampled >= script.stall_after:
            self.stalled.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    def _take_ledger(self, salt: str, tokens: Tokens) -> Ledger:
        prompt = tuple(tokens.tolist())
        longest = max((_common(prompt, old) for other, old in self._prompts if other == salt), default=0)
        cached = min(longest, len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        self._prompts.append((salt, prompt))
        return Ledger(computed=len(prompt) - cached, local=cached)


def _decision(request: GenerationRequest) -> Decision:
    here = InstanceId("stand-in-0")
    reason = f"prefill on {here}: there is no other; decode there too"
    return Decision(request.request, here, None, "round-robin", len(request.tokens), 0, 0, 0.0, reason)


def _require_known(instance: str) -> None:
    if instance != "stand-in-0":
        raise InvalidRequest(f"There is no instance {instance!r}.", field="instance", code="not_found")


def _plan_answer(
    reply: tuple[int, ...] | None, request: GenerationRequest
) -> tuple[tuple[int, ...], FinishReason]:
    limit, ends = request.sampling.max_tokens, request.sampling.stop_token_ids
    if reply is None:
        prompt = request.tokens.tolist()
        whole = tuple(prompt[at % len(prompt)] for at in range(limit))
    else:
        whole = reply + ends[:1]
    end = next((at for at, token in enumerate(whole) if token in ends), None)
    if end is not None and end < limit:
        return whole[: end + 1], FinishReason.STOP
    return whole[:limit], FinishReason.LENGTH


def _logprobs(tokens: tuple[int, ...], alternatives: int) -> tuple[TokenLogprob, ...]:
    """The chosen token with probability 1/2, then 1/4, 1/8, ... for its successors by id."""
    halves = [-0.6931471805599453 * (rank + 1) for rank in range(max(alternatives, 1))]
    return tuple(
        TokenLogprob(
            token,
            halves[0],
            tuple((token + rank, value) for rank, value in enumerate(halves[:alternatives])),
        )
        for token in tokens
    )


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
