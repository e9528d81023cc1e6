"""MemServe's CPU engine beside OpenVINO GenAI, vLLM's CPU backend and llama.cpp, on the same weights.

    python benchmarks/engine_vs_peers.py [--model smollm2-135m|llama-1b] [--quick] [--minutes N] [--rounds N]
        [--weights 4bit,bf16] [--threads 2,1] [--only 'prefill*'] [--engines memserve,llama:kv=q8_0,...]
    python benchmarks/engine_vs_peers.py --markdown [--output FILE] a result as tables for the docs

Installs each engine into an environment of its own below build/peers (once), writes the model in the format
that each reads, and starts a process per engine. In every round each figure is measured on each engine, in
changing order, one engine at work at a time. Prompts are random tokens, never the same twice; peers' prefix
caches are off. With --clock processor times are the engine's processor time divided by its threads: of use
with one thread on a machine that is busy with other things, and nowhere else.
What the settings are and why: docs/decisions/0018-engine-against-peers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from memserve import _native
from memserve.engine.models.resolve import DEFAULT_MODEL
from peers.driver import Driver
from peers.engines import (
    ENGINES,
    OURS,
    EngineSpec,
    UnknownEngine,
    command_for,
    engine_options,
    environment_for,
    model_path,
    own_python,
    parse_engine,
    recipe_for,
    why_not,
)
from peers.figures import (
    Figure,
    Limits,
    Sample,
    Spread,
    another_round,
    compare,
    figures_of,
    limit_samples,
    rotated,
    samples_of,
    select,
    spread_of,
    warm_up_of,
)
from peers.install import InstallError, install
from peers.model_files import MODELS, ModelFiles, prepare_model
from peers.protocol import Load
from peers.seat import Seat
from peers.tables import Setting, as_markdown, as_text, number
from recording import RESULTS, write_result

CACHE = Path(__file__).resolve().parent.parent / "build" / "peers"
CONTEXT = 6144
KV_TOKENS = 16_384
WEIGHTS = ("4bit", "bf16")
MINUTES = {DEFAULT_MODEL: 25.0, "llama-1b": 20.0}
QUICK_MINUTES = 5.0


@dataclass(slots=True)
class Measured:
    """Everything that one setting brought."""

    weights: str
    threads: int
    samples: list[Sample] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and the interpreters of the engines that could be installed."""

    files: ModelFiles
    figures: list[Figure]
    engines: list[EngineSpec]
    pythons: dict[str, Path]
    missing: dict[str, str]
    rounds: int
    clock: str


def install_engines(engines: Sequence[EngineSpec], cache: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreter of each engine by label, and why there is none."""
    pythons, missing = {}, {}
    for engine in engines:
        recipe = recipe_for(engine)
        try:
            pythons[engine.label] = install(recipe, cache) if recipe else own_python()
        except InstallError as error:
            missing[engine.label] = f"cannot be installed: {error}"
    return pythons, missing


def take_seat(plan: Plan, engine: EngineSpec, weights: str, threads: int) -> Seat:
    """A seat for ``engine``, out from the start where it cannot take part."""
    path = model_path(engine, plan.files, weights)
    python = plan.pythons.get(engine.label)
    load = Load(
        str(path),
        weights,
        threads,
        CONTEXT,
        KV_TOKENS,
        plan.files.spec.vocabulary,
        engine_options(engine),
        plan.clock,
    )
    log = CACHE / "logs" / f"{engine.label.replace(':', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    found = python or own_python()
    start = partial(Driver, command_for(engine, found), environment_for(engine, found, threads), log)
    seat = Seat(engine.label, start, load, warm_up_of(plan.figures))
    if python is None:
        seat.refusals[""] = plan.missing[engine.label]
    elif path is None:
        seat.refusals[""] = why_not(engine, weights)
    return seat


@contextmanager
def all_seated(plan: Plan, weights: str, threads: int) -> Iterator[dict[str, Seat]]:
    """Started one after the other; ended together."""
    with ExitStack() as stack:
        seats = {}
        for engine in plan.engines:
            seat = take_seat(plan, engine, weights, threads)
            stack.callback(seat.close)
            seat.open()
            said = seat.refusals.get("") or f"ready after {seat.behaviour.ready_seconds[-1]:.1f} s"
            print(f"{engine.label}: {said}", flush=True)
            seats[engine.label] = seat
        yield seats


def measure_rounds(plan: Plan, seats: dict[str, Seat], measured: Measured, share: float) -> None:
    """Rounds until ``share`` seconds are used up."""
    begun = time.monotonic()
    while another_round(measured.rounds, plan.rounds, time.monotonic() - begun, share):
        threads = measured.threads
        measured.limits.append(Limits(_native.read_bandwidth(threads), _native.dot_peak(threads)))
        for at, figure in enumerate(plan.figures):
            for label in rotated(list(seats), measured.rounds + at):
                measured.samples += measure_one(seats[label], figure, measured.rounds)
        measured.rounds += 1
        print(f"round {measured.rounds}: {time.monotonic() - begun:.0f} s", flush=True)


def measure_one(seat: Seat, figure: Figure, turn: int) -> list[Sample]:
    answer = seat.measure(figure)
    if answer is None:
        return []
    samples = samples_of(figure, answer, seat.label, turn)
    print(
        f"  {seat.label}: {', '.join(f'{each.metric} {number(each.value)}' for each in samples)}", flush=True
    )
    return samples


def setting_of(plan: Plan, measured: Measured, seats: dict[str, Seat]) -> Setting:
    size = plan.files.weight_bytes(measured.weights)
    limits: dict[str, Spread] = {}
    # The limits are taken on the wall's clock, which says nothing about processor time.
    for figure in plan.figures if plan.clock == "wall" else []:
        if rates := limit_samples(figure, plan.files.spec, size, measured.limits):
            limits[f"{figure.name}: tokens/s"] = spread_of(rates)
    return Setting(
        measured.weights,
        measured.threads,
        tuple(seats),
        tuple(compare(measured.samples, plan.engines[0].label)),
        limits,
        {label: seat.refusals for label, seat in seats.items() if seat.refusals},
        {label: describe(seat) for label, seat in seats.items() if seat.behaviour.ready_seconds},
    )


def describe(seat: Seat) -> dict[str, str]:
    behaviour = seat.behaviour
    return {
        "ready after": " / ".join(f"{seconds:.1f} s" for seconds in behaviour.ready_seconds),
        "memory when loaded": f"{behaviour.loaded_bytes >> 20} MiB",
        "at most": f"{behaviour.resident_bytes >> 20} MiB",
        "share of a core between turns": f"{behaviour.idle_share:.3f}",
    }


def run(
    plan: Plan, weights: Sequence[str], threads: Sequence[int], seconds: float
) -> Iterator[dict[str, object]]:
    """Measure all settings, each with an equal share of what is left of the time; yield their records."""
    pairs = [(kind, count) for kind in weights for count in threads]
    deadline = time.monotonic() + seconds
    for at, (kind, count) in enumerate(pairs):
        share = (deadline - time.monotonic()) / (len(pairs) - at)
        begun, measured = time.monotonic(), Measured(kind, count)
        print(f"\n== {kind} weights, {count} threads", flush=True)
        with all_seated(plan, kind, count) as seats:
            measure_rounds(plan, seats, measured, share - (time.monotonic() - begun))
        setting = setting_of(plan, measured, seats)
        print(as_text(setting), flush=True)
        yield record(plan, setting, measured, seats)


def record(plan: Plan, setting: Setting, measured: Measured, seats: dict[str, Seat]) -> dict[str, object]:
    """All of a setting: what the tables are made of, each sample, and what each engine said about itself."""
    return {
        "table": asdict(setting),
        "rounds": measured.rounds,
        "machine_limits": [asdict(each) for each in measured.limits],
        "samples": [asdict(each) for each in measured.samples],
        "engines": {label: seat.about for label, seat in seats.items()},
        "weight_bytes": plan.files.weight_bytes(measured.weights),
    }


def read_model(output: Path) -> str:
    """Whose figures a result has."""
    model: str = json.loads(output.read_text())["model"]
    return model


def read_tables(path: Path) -> list[Setting]:
    """The tables of a result file."""
    settings = json.loads(path.read_text())["settings"]
    return [msgspec.convert(each["table"], Setting) for each in settings]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL)
    parser.add_argument("--engines", default=",".join(ENGINES), help="NAME[:OPTION=VALUE]..., by commas")
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--threads", default="2,1", help="thread counts, by commas")
    parser.add_argument("--only", action="append", default=[], help="figures whose name matches; repeatable")
    parser.add_argument("--rounds", type=int, default=9, help="at most; the time may allow fewer")
    parser.add_argument("--minutes", type=float, help="for the whole run; default 25, 20 for llama-1b")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--quick", action="store_true", help="few and small figures, 5 minutes")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/engine_vs_peers[_MODEL].json"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables of the output and end")
    return parser.parse_args()


def main() -> None:
    asked = parse()
    suffix = "" if asked.model == DEFAULT_MODEL else f"_{asked.model}"
    output = asked.output or RESULTS / f"engine_vs_peers{suffix}.json"
    if asked.markdown:
        print(as_markdown(read_model(output), read_tables(output)))
        return
    try:
        engines = [parse_engine(text) for text in asked.engines.split(",")]
    except UnknownEngine as error:
        sys.exit(str(error))
    engines.sort(key=lambda engine: engine.name != OURS)
    figures = select(figures_of(asked.model, quick=asked.quick), asked.only)
    if not figures:
        sys.exit(f"no figure matches {asked.only}; there are: {[f.name for f in figures_of(asked.model)]}")
    files = prepare_model(asked.model, CACHE / "models")
    pythons, missing = install_engines(engines, CACHE)
    plan = Plan(files, figures, engines, pythons, missing, asked.rounds, asked.clock)
    minutes = asked.minutes or (QUICK_MINUTES if asked.quick else MINUTES[asked.model])
    begun = time.monotonic()
    threads = [int(count) for count in asked.threads.split(",")]
    records: list[dict[str, object]] = []
    about = {"model": asked.model, "clock": asked.clock, "isa": _native.isa()}
    for each in run(plan, asked.weights.split(","), threads, 60 * minutes):
        # Written after each setting, so that a run that is cut short leaves what it has.
        records.append(each)
        taken = {"seconds": round(time.monotonic() - begun), "settings": records}
        print(f"\n{write_result('engine_vs_peers', about | taken, output)}", flush=True)


if __name__ == "__main__":
    main()
