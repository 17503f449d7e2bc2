"""What TensorBoard shows when a run is done: test examples with their predictions, and the hyperparameters."""

from __future__ import annotations

from typing import Any

from lra.config import RunConfig
from lra.evaluate import Scores
from lra.feed import Data
from lra.pictures import example_grid
from lra.run_dir import RunDir
from tasks.registry import Task, get

NUM_EXAMPLES = 12


def write_examples_and_hparams(
    run: RunDir, config: RunConfig, data: Data, scores: Scores, result: dict[str, Any]
) -> None:
    """Add a picture of the first test examples and the run's hyperparameters to its event files."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    task = get(config.task.name)
    first = data.splits["test"][:NUM_EXAMPLES]
    figure = example_grid(
        [data.cache.example(int(i))[0] for i in first],
        scores.labels[:NUM_EXAMPLES].tolist(),
        scores.predictions[:NUM_EXAMPLES].tolist(),
        grid=task.grid,
        decode=decoder(task),
        title=f"{task.title}: first test examples",
    )
    values = {
        "task": config.task.name,
        "protocol": config.protocol,
        "backend": config.attention.backend,
        "seed": config.seed,
        "learning_rate": config.train.learning_rate,
        "batch_size": config.train.batch_size,
        "depth": config.model.depth,
        "width": config.model.width,
        "dropout": config.model.dropout,
    }
    metrics = {f"hparam/test_accuracy_{name}": test["accuracy"] for name, test in result["test"].items()}
    board = SummaryWriter(str(run.path))
    board.add_figure("test/examples", figure, result["step"])
    for summary in hparams(values, metrics):
        board._get_file_writer().add_summary(summary, result["step"])
    for name, value in metrics.items():
        board.add_scalar(name, value, result["step"])
    board.close()


def decoder(task: Task) -> Any:
    """Return a function from a text task's bytes to readable text; None for images."""
    if task.grid is not None:
        return None
    names = task.token_names
    if names:
        return lambda tokens: " ".join(names[t] for t in tokens)
    return lambda tokens: bytes(tokens).decode("utf-8", errors="replace")
