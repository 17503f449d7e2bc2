"""Does a Pathfinder model trace or count? Tests of a finished run on sets that differ from its own in one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lra.base.files import write_json_atomic
from lra.chain import Probe
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import evaluate
from lra.experiment import open_data
from lra.model import Classifier
from lra.preempt import StopRequest, catch_signals
from lra.run_dir import RunDir, read_json
from lra.transfer import checkpoint_of, tested_weights

# Not the seed of any training set: the generator's images are functions of seed and number.
PROBE_SEED = 9_001


def probe_configs(config: RunConfig, probe: Probe) -> dict[str, RunConfig]:
    """Return the run's config on each other set, by the set's name."""
    changes = {f"contour_length={n}": {"contour_length": n} for n in probe.contour_lengths}
    changes |= {f"num_distractors={n}": {"num_distractors": n} for n in probe.distractors}
    common = {"count": probe.images, "seed": PROBE_SEED}
    return {
        name: config.model_copy(update={"task": config.task.model_copy(update=common | change)})
        for name, change in changes.items()
    }


def probe_model(
    run: RunDir, config: RunConfig, probe: Probe, folder: Path, world: World, minutes: float | None
) -> dict[str, Any]:
    """Test a run's chosen checkpoint on each of the probe's sets, every pixel a token; return their summaries.

    What is found is kept in probes.json as it is found. Raises Stopped when the minutes are over.
    """
    path = folder / "probes.json"
    saved = checkpoint_of(run, config.train.checkpoint_choice)
    known = read_json(path) or {}
    found: dict[str, Any] = known.get("sets", {}) if known.get("step") == saved.step else {}
    todo = {
        name: c for name, c in probe_configs(config, probe).items() if found.get(name, {}).get("total") != probe.images
    }
    if not todo:
        return found
    model = Classifier(config).to(world.device)
    model.load_state_dict(tested_weights(saved))
    stop = StopRequest(minutes)
    with catch_signals(stop):
        for name, changed in todo.items():
            with stop.at_once():
                cache = open_data(changed).cache
            everything = np.arange(cache.num_examples)
            partial = folder / f"partial-probe-{name}.json"
            scores = evaluate(model, changed, cache, everything, world, stop=stop, partial=partial, title=name)
            found = found | {name: scores.summary()}
            if world.is_main:
                write_json_atomic(path, {"step": saved.step, "sets": found})
    return found
