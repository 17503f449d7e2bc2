"""A run's tested weights alone, in a folder that `eval` and train.start_from take as they take the run."""

from __future__ import annotations

import shutil
from pathlib import Path

from lra import checkpoint as checkpoints
from lra.base.files import disk_errors, write_text_atomic
from lra.recipes import dump_config
from lra.run_dir import RunDir
from lra.transfer import checkpoint_of, tested_weights


def export_weights(run: RunDir, folder: Path) -> Path:
    """Write config, result and the weights that the recipe reports (averaged ones, no optimizer) into `folder`.

    An export that is there already is replaced. Returns the folder.
    """
    config = run.config()
    saved = checkpoint_of(run, config.train.checkpoint_choice)
    plain = config.model_copy(
        update={
            "runs_folder": "runs",
            "train": config.train.model_copy(update={"start_from": None}),
            "data": config.data.model_copy(update={"folder": "data"}),
        }
    )
    tensors = {f"model.{name}": value for name, value in tested_weights(saved).items()}
    # Both of a run's checkpoints are this one here, whatever `eval --checkpoint` asks for.
    best = {"step": saved.step, "summary": (saved.state["best"] or {}).get("summary", {})}
    with disk_errors(folder):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save(folder / "checkpoints", saved.step, tensors, {"best": best}, set())
        write_text_atomic(folder / "config.yaml", dump_config(plain))
        for name in ("result.json", "environment.json"):
            if (run.path / name).is_file():
                shutil.copyfile(run.path / name, folder / name)
    return folder
