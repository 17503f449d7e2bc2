"""What best recipes add: hidden tokens, changed examples that keep their labels; each does what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lra.base.errors import ConfigError
from lra.config import DenoiseConfig, RunConfig
from lra.experiment import open_data, run_training
from lra.feed import make_batches
from lra.learner import make_learner
from lra.model import Classifier
from lra.objective import Objective, denoise_factor, hidden_tokens
from lra.recipes import load_config
from tasks.batches import rounded
from tasks.image_batches import moved
from tasks.listops import evaluate, shuffle_operands, write_expression
from tests.train.test_step import batch_of
from tests.train.test_training import ALONE, tiny

DENOISE = "train.denoise={rate: 0.3, weight: 0.5, until: 0.5}"


def test_share_and_weight_of_denoising_fall_to_zero() -> None:
    denoise = DenoiseConfig(rate=0.3, weight=0.5, until=0.5)
    assert [denoise_factor(step, 100, denoise) for step in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]


def test_only_tokens_are_hidden_at_the_rate_that_is_asked_for() -> None:
    torch.manual_seed(0)
    batch = rounded(batch_of([4000, 3000, 1000]), 4096)
    hidden = hidden_tokens(batch, torch.tensor(0.25))
    assert not hidden[8000:].any() and hidden[:8000].float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not hidden_tokens(batch, torch.tensor(0.0)).any()


def test_a_cls_row_is_never_hidden(tiny_data: Path) -> None:
    config = tiny("listops", tiny_data, "model.pooling=cls")
    batch = make_batches(config, open_data(config), ALONE).at(0)[0]
    hidden = hidden_tokens(batch, torch.tensor(0.999))
    assert not hidden[batch.cu_seqlens[1:].long() - 1].any() and hidden.float().mean() > 0.9


def test_the_encoder_does_not_see_what_is_hidden(tiny_data: Path) -> None:
    config = tiny("listops", tiny_data, DENOISE)
    model = Classifier(config).eval()
    batch = make_batches(config, open_data(config), ALONE).at(0)[0]
    hidden = torch.zeros(len(batch.tokens_T), dtype=torch.bool)
    hidden[3] = True
    other = batch.clone()
    other.tokens_T[3] = batch.tokens_T[3] % 15 + 1
    assert torch.equal(model.encode(batch, hidden)[0], model.encode(other, hidden)[0])
    assert not torch.equal(model.encode(batch)[0], model.encode(other)[0])
    assert torch.equal(model(batch), model.classify(*model.encode(batch)))


def test_the_loss_is_the_sum_that_it_says(tiny_data: Path) -> None:
    config = tiny("listops", tiny_data, DENOISE, "model.dropout=0.0", "train.label_smoothing=0.1")
    model = Classifier(config)
    objective = Objective(model, config.train)
    batch = make_batches(config, open_data(config), ALONE).at(0)[0]
    objective.begin(config.train.steps // 4)
    torch.manual_seed(3)
    loss = objective(batch)
    torch.manual_seed(3)
    hidden = hidden_tokens(batch, torch.tensor(0.3 * 0.5))
    x, packed = model.encode(batch, hidden)
    assert model.denoiser is not None
    guesses = F.cross_entropy(model.denoiser.guess(x)[hidden], batch.tokens_T[hidden].long())
    labels = F.cross_entropy(model.classify(x, packed), batch.labels_B, label_smoothing=0.1)
    torch.testing.assert_close(loss, labels + 0.5 * 0.5 * guesses, rtol=1e-5, atol=1e-6)
    objective.begin(config.train.steps - 1)
    torch.testing.assert_close(objective(batch), objective.label_loss(model(batch), batch))


def test_without_denoising_there_is_no_part_for_it(tiny_data: Path) -> None:
    names = dict(Classifier(tiny("listops", tiny_data)).named_parameters())
    assert not any("denoiser" in name for name in names)


def test_a_denoising_run_learns_to_guess_and_resumes(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny(
        "text", tiny_data, DENOISE, f"runs_folder={tmp_path}", "name=run", "train.steps=6", "train.eval_every=3",
        "train.log_every=1", "train.ema=0.9",
    )  # fmt: skip
    assert run_training(config)["status"] == "finished"
    learner = make_learner(config, ALONE)
    batches = make_batches(config, open_data(config), ALONE)
    optimizer = torch.optim.Adam(learner.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = learner.forward(batches.at(0)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


EXPRESSIONS = ("( ( ( [MAX 1 ) 2 ) ] )", "( ( ( ( ( [MED 4 ) 9 ) ( ( ( [SM 7 ) 8 ) ] ) ) 3 ) ] )")


def expressions(count: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return packed expressions of the generator with their bounds and values."""
    from tasks.generate_listops import draw_block
    from tasks.listops import ListOpsOptions

    block = draw_block(ListOpsOptions(name="listops", min_length=20, max_length=300), 0)
    ends = np.cumsum(block.lengths[:count])
    bounds = np.stack([ends - block.lengths[:count], ends], axis=1)
    return block.tokens[: ends[-1]].copy(), bounds, block.labels[:count].tolist()


def test_shuffled_operands_keep_every_value_and_every_token() -> None:
    tokens, bounds, values = expressions(200)
    before = tokens.copy()
    shuffle_operands(tokens, bounds, 7)
    changed = 0
    for (start, stop), value in zip(bounds, values, strict=True):
        parsed, found = evaluate(write_expression(tokens[start:stop]).decode())
        assert found == value and np.array_equal(parsed, tokens[start:stop])
        assert sorted(tokens[start:stop]) == sorted(before[start:stop])
        changed += not np.array_equal(tokens[start:stop], before[start:stop])
    assert changed > 180


def test_shuffling_is_a_function_of_its_seed_and_reaches_every_order() -> None:
    tokens, bounds, _ = expressions(20)
    runs = []
    for seed in (1, 1, 2):
        copy = tokens.copy()
        shuffle_operands(copy, bounds, seed)
        runs.append(copy)
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])
    short, _ = evaluate("( ( ( ( [SM 1 ) 2 ) 3 ) ] )")
    seen = set()
    for seed in range(200):
        copy = short.copy()
        shuffle_operands(copy, np.array([[0, len(copy)]]), seed)
        seen.add(copy.tobytes())
    assert len(seen) == 6


def test_an_expression_that_was_cut_stays_as_it_is() -> None:
    tokens, bounds, _ = expressions(5)
    bounds[:, 1] -= 2
    before = tokens.copy()
    shuffle_operands(tokens, bounds, 3)
    assert np.array_equal(tokens, before)


def shuffled(tiny_data: Path, *overrides: str) -> RunConfig:
    return tiny("listops", tiny_data, "track=open", "data.shuffle_operands=true", *overrides)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_batches_are_shuffled_by_step_and_only_in_training(pooling: str, tiny_data: Path) -> None:
    config = shuffled(tiny_data, f"model.pooling={pooling}", "data.max_length=2000", "train.batch_size=4")
    data = open_data(config)
    plain = make_batches(
        config.model_copy(update={"data": config.data.model_copy(update={"shuffle_operands": False})}), data, ALONE
    )
    batches = make_batches(config, data, ALONE)
    one, again, other = batches.at(0)[0], batches.at(0)[0], plain.at(0)[0]
    assert torch.equal(one.tokens_T, again.tokens_T) and not torch.equal(one.tokens_T, other.tokens_T)
    assert torch.equal(one.tokens_T.sort().values, other.tokens_T.sort().values)
    ends = one.cu_seqlens[1:].long() - 1
    assert torch.equal(one.tokens_T[ends], other.tokens_T[ends])


def test_moved_images_move() -> None:
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 16)
    none = torch.tensor([[0, 0]])
    same, flipped = torch.tensor([False]), torch.tensor([True])
    assert torch.equal(moved(image, none, same, 4), image)
    assert torch.equal(moved(image, none, flipped, 4).view(4, 4), image.view(4, 4).flip(1))
    down = moved(image, torch.tensor([[1, -2]]), same, 4).view(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.uint8)
    expected[1:, :2] = image.view(4, 4)[:3, 2:]
    assert torch.equal(down, expected)
    both = moved(image, torch.tensor([[0, 1]]), flipped, 4).view(4, 4)
    assert torch.equal(both[:, 1:], image.view(4, 4).flip(1)[:, :3]) and not both[:, 0].any()


def test_image_batches_are_mirrored_and_moved_by_step(tiny_data: Path) -> None:
    options = ["track=open", "data.mirror=true", "data.shift=4", "train.batch_size=8"]
    config = tiny("image", tiny_data, *options)
    batches = make_batches(config, open_data(config), ALONE)
    one, again, next_step = batches.at(0)[0], batches.at(0)[0], batches.at(1)[0]
    assert torch.equal(one.tokens_T, again.tokens_T)
    plain = make_batches(tiny("image", tiny_data, "train.batch_size=8"), open_data(config), ALONE).at(0)[0]
    assert torch.equal(one.labels_B, plain.labels_B) and not torch.equal(one.tokens_T, plain.tokens_T)
    assert one.tokens_T.shape == next_step.tokens_T.shape


@pytest.mark.parametrize(
    ("recipe", "override", "said"),
    [
        ("text/smoke", "data.shuffle_operands=true", "has no operators"),
        ("listops/smoke", "data.shuffle_operands=true", "open track"),
        ("listops/smoke", "data.mirror=true", "open track"),
        ("image/nystrom", "data.shift=3", "open track"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(recipe, [override])


@pytest.mark.parametrize("task", ["listops", "text", "image", "pathfinder"])
def test_the_best_recipe_of_each_task_trains(task: str, tiny_data: Path, tmp_path: Path) -> None:
    release = {"listops": ["task.count=100000", "data.max_length=200"], "pathfinder": ["task.count=200000"]}
    config = load_config(
        f"{task}/best",
        [f"data.folder={tiny_data}", f"runs_folder={tmp_path}", "name=run", "model.depth=1", "train.batch_size=2",
         "train.eval_batch_size=2", "train.steps=2", "train.eval_every=2", "data.limit_eval=2",
         *release.get(task, ["data.max_length=200"] if task == "text" else [])],
    )  # fmt: skip
    assert config.attention.backend == "flash" and config.protocol == "best"
    assert run_training(config)["status"] == "finished"
