"""Claim: the global scheduler decides faster than requests come (one process, one core).

Replays the prompts of a Mooncake-format trace (or generated ones of the same shape) through
``GlobalScheduler.route`` and the pool events that follow, at several cluster sizes, half prefill and half
decode. Times each call alone, garbage collection included; there is no network, no engine and no heartbeat
in it. Events follow at once, so the trees are as full as they can be, and load comes from bookings only: the
``matched_ratio`` says how warm the trees were, nothing about the policies. The floor printed beside is one
comparison of the prompt's tokens. On a busy machine wall times hold other processes' time slices; processor
times do not.

Second claim: keeping what explains a decision costs at most 5 % of it. A second scheduler that explains
nothing gets the same calls, now before, now after the first, on the same clock; both must decide alike.

    python benchmarks/scheduler_decisions.py --traces FOLDER
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memserve.core.clock import VirtualClock
from memserve.core.config import POLICIES
from memserve.core.messages import Member, PoolEvent, PoolEvents, Ready, Removed, Stored
from memserve.core.types import InstanceId, Namespace, RequestId, Role, Tokens, as_tokens, pack_tokens
from memserve.scheduler.decision import Decision, RouteRequest
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.service import GlobalScheduler
from recording import write_result

HASH_BLOCK = 512
MATCH_EVERY = 8
"""Each so many prompts the match alone is timed; the two routes that follow find the caches equally warm."""
PREFILL_SECONDS = 25.0
"""So often a request comes per place that prefills, on the schedulers' clock: about what one takes there."""
CONVERSATION = "mooncake_conversation.jsonl"
VOCABULARY = 128_000
SPACE = Namespace("trace")


@dataclass(frozen=True, slots=True)
class Prompt:
    """``ids``: one per 512 tokens, equal ids mean equal prefixes; ``length`` in tokens."""

    ids: tuple[int, ...]
    length: int


@dataclass(slots=True)
class Cache:
    """What one instance would hold: whole prompts, the oldest leave when ``capacity`` tokens are exceeded."""

    capacity: int
    seq: int = 0
    used: int = 0
    prompts: deque[Prompt] = field(default_factory=deque)
    references: Counter[int] = field(default_factory=Counter)

    def add(self, prompt: Prompt, tokens: Tokens) -> list[PoolEvent]:
        """Events of a pool that takes the prompt in."""
        events: list[PoolEvent] = [Stored(SPACE, pack_tokens(tokens))]
        self.prompts.append(prompt)
        self.references.update(prompt.ids)
        self.used += prompt.length
        while self.used > self.capacity and len(self.prompts) > 1:
            oldest = self.prompts.popleft()
            self.references.subtract(oldest.ids)
            self.used -= oldest.length
            shared = next((n for n, i in enumerate(oldest.ids) if not self.references[i]), len(oldest.ids))
            keep = min(shared * HASH_BLOCK, oldest.length)
            events.append(Removed(SPACE, pack_tokens(expand(oldest)), keep))
        return events


def read_trace(path: Path, limit: int) -> list[Prompt]:
    with path.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(limit), strict=False)]
    return [Prompt(tuple(row["hash_ids"]), row["input_length"]) for row in rows]


def generate_prompts(limit: int) -> list[Prompt]:
    """Multi-turn sessions behind one shared first block; about 12k tokens per prompt on average."""
    random = np.random.default_rng(0)
    sessions: list[list[int]] = []
    fresh = 1
    prompts = []
    for _ in range(limit):
        if not sessions or random.random() < 0.5:
            sessions.append([0])
        session = sessions[max(0, len(sessions) - 1 - int(random.exponential(50)))]
        grown = 1 + int(random.exponential(16))
        session.extend(range(fresh, fresh + grown))
        fresh += grown
        prompts.append(Prompt(tuple(session), len(session) * HASH_BLOCK - int(random.integers(HASH_BLOCK))))
    return prompts


def expand(prompt: Prompt) -> Tokens:
    """Token j of id = splitmix64(id * 512 + j) mod vocabulary, cut to the prompt's length."""
    x = np.asarray(prompt.ids, np.uint64)[:, None] * np.uint64(HASH_BLOCK)
    x = x + np.arange(HASH_BLOCK, dtype=np.uint64) + np.uint64(1)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return as_tokens((x % np.uint64(VOCABULARY)).reshape(-1)[: prompt.length])


class Cluster:
    """A scheduler whose instances answer at once with the pool events of what they were given."""

    def __init__(
        self, instances: int, policy: str, capacity: int, clock: VirtualClock, *, explains: bool
    ) -> None:
        self.scheduler = GlobalScheduler(policy_by_name(policy), clock, explains=explains)
        self.routes: list[float] = []
        self.works: list[float] = []
        self.firsts: list[float] = []
        self.caches: dict[InstanceId, Cache] = {}
        self.prefilling: list[tuple[float, RequestId]] = []
        self.decoding: deque[RequestId] = deque()
        self.places = instances
        for n in range(instances):
            role = Role.PREFILL if n < instances // 2 else Role.DECODE
            name = InstanceId(f"{role.value}-{n:04}")
            member = Member(name, 1, role, f"@{name}")
            ready = Ready(
                instance=name,
                peer_address=member.peer_address,
                model="trace",
                context=1 << 17,
                block_tokens=16,
                blocks=capacity // 16,
                block_bytes=0,
                layout_fingerprint="",
                isa="",
            )
            self.scheduler.member_ready(member, ready)
            self.caches[name] = Cache(capacity)

    def route(self, request: RouteRequest) -> Decision:
        """The decision; what it took is kept, in seconds of wall and of processor time."""
        started, worked = time.perf_counter(), time.thread_time()
        decision = self.scheduler.route(request)
        self.works.append(time.thread_time() - worked)
        self.routes.append(time.perf_counter() - started)
        return decision

    def follow(self, decision: Decision, prompt: Prompt, tokens: Tokens) -> float:
        """Let both places store the prompt and old requests end; returns seconds spent applying events."""
        spent = 0.0
        for name in filter(None, (decision.prefill, decision.decode)):
            events = self.caches[name].add(prompt, tokens)
            batch = PoolEvents(name, 1, self.caches[name].seq, tuple(events))
            self.caches[name].seq += len(events)
            started = time.perf_counter()
            lost = self.scheduler.on_pool_events(batch)
            spent += time.perf_counter() - started
            assert not lost
        heapq.heappush(self.prefilling, (decision.decided_at + decision.predicted_ttft, decision.request))
        return spent

    def catch_up(self, now: float) -> None:
        """First tokens come when they were foreseen; as many requests decode as there are places."""
        while self.prefilling and self.prefilling[0][0] <= now:
            _, request = heapq.heappop(self.prefilling)
            worked = time.thread_time()
            self.scheduler.first_token(request)
            self.firsts.append(time.thread_time() - worked)
            self.decoding.append(request)
        while len(self.decoding) > self.places:
            self.scheduler.finish(self.decoding.popleft())


def measure(
    prompts: list[Prompt], instances: int, policy: str, capacity: int
) -> dict[str, float | int | str]:
    clock = VirtualClock()
    full = Cluster(instances, policy, capacity, clock, explains=True)
    bare = Cluster(instances, policy, capacity, clock, explains=False)
    matches, applied, matched = [], [], 0
    for n, (prompt, tokens) in enumerate(expanded(prompts)):
        clock.advance(PREFILL_SECONDS / (instances / 2))
        for cluster in (full, bare):
            cluster.catch_up(clock.now())
        request = RouteRequest(RequestId(str(n)), SPACE, tokens, session=str(prompt.ids[1:2]))
        if n % MATCH_EVERY == 0:
            matches.append(time_match(full, tokens))
        pair = (full, bare) if n % 2 else (bare, full)
        decision, other = (cluster.route(request) for cluster in pair)
        assert decision == other, "explaining must not change a decision"
        matched += decision.matched_prefill
        applied += [cluster.follow(decision, prompt, tokens) for cluster in pair]
    full.scheduler.state.check()
    nodes = full.scheduler.state.tree.nodes
    started = time.perf_counter()
    full.scheduler.member_lost(decision.prefill)
    dropped = time.perf_counter() - started
    works = full.works
    return {
        "instances": instances,
        "policy": policy,
        "decisions": len(works),
        "decisions_per_second": round(len(full.routes) / sum(full.routes)),
        "decisions_per_cpu_second": round(len(works) / sum(works)),
        "route_cpu_p50_us": percentile(works, 50),
        "route_cpu_p99_us": percentile(works, 99),
        "route_p50_us": percentile(full.routes, 50),
        "route_p99_us": percentile(full.routes, 99),
        "route_max_us": percentile(full.routes, 100),
        "unexplained_cpu_p50_us": percentile(bare.works, 50),
        "unexplained_cpu_p99_us": percentile(bare.works, 99),
        "explaining_ratio_of_medians": round(statistics.median(works) / statistics.median(bare.works), 3),
        "explaining_ratio_of_sums": round(sum(works) / sum(bare.works), 3),
        "look_back_cpu_p50_us": percentile(full.firsts, 50),
        "unexplained_first_token_cpu_p50_us": percentile(bare.firsts, 50),
        "match_p50_us": percentile(matches, 50),
        "match_p99_us": percentile(matches, 99),
        "events_p50_us": percentile(applied, 50),
        "events_p99_us": percentile(applied, 99),
        "tree_nodes": nodes,
        "drop_instance_ms": round(dropped * 1e3, 2),
        "matched_ratio": round(matched / sum(prompt.length for prompt in prompts), 3),
    }


def time_match(cluster: Cluster, tokens: Tokens) -> float:
    started = time.perf_counter()
    cluster.scheduler.state.match(SPACE, tokens)
    return time.perf_counter() - started


def expanded(prompts: list[Prompt]) -> Iterator[tuple[Prompt, Tokens]]:
    for prompt in prompts:
        yield prompt, expand(prompt)


def measure_floor(prompts: list[Prompt]) -> float:
    """p50 of comparing a prompt's tokens once with a copy of them: no exact match can be faster."""
    times = []
    for _, tokens in expanded(prompts[:500]):
        copy = tokens.copy()
        started = time.perf_counter()
        assert not (tokens != copy).any()
        times.append(time.perf_counter() - started)
    return percentile(times, 50)


def percentile(seconds: list[float], rank: float) -> float:
    return round(float(np.percentile(seconds, rank)) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, help=f"folder with {CONVERSATION}; generated prompts without")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--instances", type=int, nargs="+", default=[2, 64, 1024])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["prompt-tree", "cost"])
    parser.add_argument("--capacity", type=int, default=3_000_000, help="tokens that one instance holds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    trace: Path | None = arguments.traces and arguments.traces / CONVERSATION
    prompts = read_trace(trace, arguments.requests) if trace else generate_prompts(arguments.requests)
    rows = []
    for policy in arguments.policies:
        for instances in arguments.instances:
            rows.append(measure(prompts, instances, policy, arguments.capacity))
            print(json.dumps(rows[-1]), flush=True)
    floor = measure_floor(prompts)
    figures = {
        "prompts": trace.name if trace else "generated",
        "requests": len(prompts),
        "mean_prompt_tokens": round(statistics.fmean(prompt.length for prompt in prompts)),
        "capacity_tokens": arguments.capacity,
        "floor_compare_p50_us": floor,
        "rows": rows,
    }
    path = write_result("scheduler_decisions", figures, arguments.output)
    print(f"floor {floor} us; written to {path}")


if __name__ == "__main__":
    main()
