"""What the planner says of the benchmarks' networks, held against runs of them, in turns."""

from __future__ import annotations

from contextlib import ExitStack
from statistics import fmean, median

from pixart_nb.core.benchmark import ours
from pixart_nb.core.benchmark.runs import Row
from pixart_nb.core.benchmark.shapes import Shapes
from pixart_nb.core.benchmark.worker import Worker
from pixart_nb.core.planning.calibration import calibrate
from pixart_nb.core.planning.memory import STAGES, Networks, Run
from pixart_nb.core.planning.plan import Plan, needed_keys, plan

#: What the seconds of a stage are of.
OF = {"encode": "seconds of both texts", "denoise": "seconds of a step", "decode": "seconds of a picture"}
#: A stage that takes less seconds is run again in the same turn.
LEAST = 1.2


def compared(shapes: Shapes, repeats: int) -> list[Row]:
    """Seconds and memory of every stage as planned and as taken, and taken over planned.

    Each of ``repeats`` turns measures the machine anew and then runs each stage; every stage is a process of its own,
    whose first run does not count. Seconds are medians of the turns.
    """
    networks = Networks(
        ours.transformer_config(shapes), ours.text_config(shapes), ours.autoencoder_config(shapes)
    )
    run = Run(shapes.size, shapes.size, steps=shapes.steps, caption_tokens=shapes.words, staged=True)
    keys = needed_keys(networks.transformer, run)
    plans, taken = [], {stage: [] for stage in STAGES}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker("ours", stage, shapes)) for stage in STAGES]
        for worker in workers:
            worker.run()
        for _ in range(repeats):
            plans.append(plan(networks, run, calibrate(networks, run, keys), fresh=False))
            for worker in workers:
                taken[worker.work].append(_taken(worker))
        versions = workers[0].ready["versions"]
        peaks = {worker.work: worker.peak(mapped=False) for worker in workers}
    rows = []
    for stage in STAGES:
        measures = {
            OF[stage]: (median(_planned(found, stage) for found in plans), median(taken[stage]), "s"),
            "peak memory": (_held(plans[0], stage) / 1e9, peaks[stage], "GB"),
        }
        for name, (said, found, unit) in measures.items():
            values = {"plan": (said, unit), "ours": (found, unit), "ratio": (found / said, "x")}
            rows += [
                Row(stage, shapes.size, system, name, *value, versions) for system, value in values.items()
            ]
    return rows


def _taken(worker: Worker) -> float:
    """Seconds of a run, the mean of those that take ``LEAST`` together, as the planner measures."""
    found: list[float] = []
    while not found or sum(found) < LEAST:
        found.append(_seconds(worker.run()))
    return fmean(found)


def _seconds(answer: dict) -> float:
    """Seconds of a run; of a step where it consists of steps, without the first, which prepares."""
    steps = answer.get("steps")
    return median(steps[1:] or steps) if steps else answer["seconds"]


def _planned(found: Plan, stage: str) -> float:
    (planned,) = (s for s in found.stages if s.name == stage)
    return found.seconds_per_step if stage == "denoise" else planned.seconds - planned.first_seconds


def _held(found: Plan, stage: str) -> float:
    """Bytes of a stage in a process of its own."""
    (planned,) = (s for s in found.stages if s.name == stage)
    return found.process + planned.weights + planned.activations
