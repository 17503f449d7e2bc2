"""What the model computes: packing, backends, positions, pooling, key masks, the two-document head."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lra.attention import backend_names
from lra.config import RunConfig
from lra.model import Rows
from lra.packing import pack_info, pad, unpad
from lra.pooling import Pool
from lra.positions import axial_rotary_angles, rotary_angles, rotate, sinusoidal_table
from lra.recipes import load_config
from tasks.registry import get
from tests.model.helpers import keys_where, make_batch, model_of, one, small

LENGTHS = [5, 64, 1, 33]
EXACT = ("standard", "flash", "block_sparse", "sdpa")


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "attention", "padded_mean"])
def test_a_sequence_does_not_see_its_neighbours(backend: str, pooling: str) -> None:
    config = small(f"attention={backend}", f"model.pooling={pooling}", "model.positions=learned")
    model = model_of(config)
    batch = make_batch(LENGTHS, cls_position=64 if pooling == "cls" else None)
    together = model(batch)
    alone = torch.cat([model(one(batch, i)) for i in range(len(LENGTHS))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "none"])
def test_standard_flash_sdpa_and_dense_blocks_agree(positions: str) -> None:
    batch = make_batch(LENGTHS)
    logits = {}
    for backend in EXACT:
        config = small(f"attention={backend}", f"model.positions={positions}", "attention.layout=dense")
        model = model_of(config)
        logits[backend] = model(batch)
    for backend, value in logits.items():
        torch.testing.assert_close(value, logits["standard"], rtol=1e-5, atol=1e-5, msg=backend)


@pytest.mark.parametrize("backend", ["standard", "flash", "sdpa"])
def test_keys_left_out_change_nothing_when_their_content_changes(backend: str) -> None:
    config = small(f"attention={backend}", "model.pooling=cls")
    model = model_of(config)
    batch = make_batch(LENGTHS, cls_position=64)
    keep = torch.ones(batch.num_tokens, dtype=torch.bool)
    # Leave out rows 7 to 20 of the second sequence; only the CLS rows are read, so their bytes must not matter.
    keep[6 + 7 : 6 + 20] = False
    batch = batch.__class__(**{**batch.__dict__, "keys": keys_where(batch, keep)})
    before = model(batch)
    tokens = batch.tokens_T.clone()
    tokens[6 + 7 : 6 + 20] = 3
    after = model(batch.__class__(**{**batch.__dict__, "tokens_T": tokens}))
    torch.testing.assert_close(before, after)
    kept = torch.ones(batch.num_tokens, dtype=torch.bool)
    full = model(batch.__class__(**{**batch.__dict__, "keys": keys_where(batch, kept)}))
    without = model(batch.__class__(**{**batch.__dict__, "keys": None}))
    torch.testing.assert_close(full, without, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, full)


@pytest.mark.parametrize(("end_global", "sees_all"), [(0, False), (1, True)])
def test_the_cls_of_one_block_sparse_layer_sees_every_pixel_with_a_global_end(end_global: int, sees_all: bool) -> None:
    config = load_config(
        "image/google", ["attention=block_sparse", "data.black_pixels=token", f"attention.end_global={end_global}"]
    )
    model = model_of(config)
    batch = make_batch([1024], cls_position=1024, high=255)
    before = model(batch)
    seen = []
    for block in range(16):
        tokens = batch.tokens_T.clone()
        tokens[64 * block : 64 * block + 64] ^= 1
        seen.append(not torch.equal(model(batch.__class__(**{**batch.__dict__, "tokens_T": tokens})), before))
    assert all(seen) == sees_all and any(seen)


def test_dropping_black_pixels_equals_masking_them_when_their_outputs_are_zeroed() -> None:
    """The nystrom protocol: keys masked and outputs zeroed under a padded mean is the same as leaving tokens out."""
    config = small("model.pooling=padded_mean", "model.positions=learned", "model.num_positions=64")
    model = model_of(config)
    batch = make_batch([64, 64], high=4)
    keep = batch.tokens_T != 1
    masked = batch.__class__(**{**batch.__dict__, "keys": keys_where(batch, keep)})
    counts = [int(keep[:64].sum()), int(keep[64:].sum())]
    dropped = batch.__class__(
        tokens_T=batch.tokens_T[keep],
        positions_T=batch.positions_T[keep],
        cu_seqlens=torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32),
        max_length=max(counts),
        labels_B=batch.labels_B,
    )
    taken: dict[str, torch.Tensor] = {}
    model.final_norm.register_forward_hook(lambda module, args, out: taken.update(x=out))
    model(masked)
    expected = torch.stack([taken["x"][:64][keep[:64]].sum(0), taken["x"][64:][keep[64:]].sum(0)]) / 64
    torch.testing.assert_close(model(dropped), model.head(expected), rtol=1e-5, atol=1e-5)


def test_google_head_dim_4_equals_plain_attention_with_head_dim_4() -> None:
    config = small("model.qkv_width=8", "attention=flash", "model.positions=none")  # two heads of 4, computed as 8
    model = model_of(config)
    attention = model.layers[0].attention
    x = torch.randn(10, 16)
    packed = pack_info(torch.tensor([0, 10], dtype=torch.int32), 10, 10)
    out = attention(x, Rows(packed, None, None, None), torch.zeros(2, dtype=torch.int64))
    q, k, v = attention.qkv(x).view(10, 3, 2, 4).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(4)
    plain = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    torch.testing.assert_close(out, attention.out(plain), rtol=1e-5, atol=1e-5)


def test_empty_sequences_give_finite_logits_and_gradients() -> None:
    """A black image under black_pixels=dropped has no token at all."""
    for pooling in ("mean", "max", "padded_mean", "attention"):
        model = model_of(small(f"model.pooling={pooling}")).train()
        batch = make_batch([5, 0, 3])
        logits = model(batch)
        logits.sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_pad_and_unpad_are_inverse_and_their_gradients_too() -> None:
    x = torch.randn(39, 2, 3, dtype=torch.float64, requires_grad=True)
    packed = pack_info(torch.tensor([0, 5, 5, 37], dtype=torch.int32), 32, 39)  # two rows after the end
    padded = pad(x, packed)
    assert padded.shape == (3, 32, 2, 3)
    assert padded[0, 5:].abs().sum() == 0 and padded[1].abs().sum() == 0
    back = unpad(padded, packed)
    torch.testing.assert_close(back[:37], x[:37])
    assert back[37:].abs().sum() == 0
    assert torch.autograd.gradcheck(lambda t: unpad(pad(t, packed) ** 2, packed), (x,))


def test_pooling_against_numpy() -> None:
    x = torch.randn(12, 4)
    packed = pack_info(torch.tensor([0, 3, 12], dtype=torch.int32), 9, 12)
    a, b = x[:3].numpy(), x[3:].numpy()
    np.testing.assert_allclose(Pool("mean", 4, 16)(x, packed), np.stack([a.mean(0), b.mean(0)]), rtol=1e-5)
    np.testing.assert_allclose(Pool("padded_mean", 4, 16)(x, packed), np.stack([a.sum(0), b.sum(0)]) / 16, rtol=1e-5)
    np.testing.assert_allclose(Pool("max", 4, 16)(x, packed), np.stack([a.max(0), b.max(0)]))
    np.testing.assert_allclose(Pool("cls", 4, 16)(x, packed), np.stack([a[-1], b[-1]]))
    pool = Pool("attention", 4, 16)
    torch.nn.init.normal_(pool.score)
    w = np.exp(b @ pool.score.detach().numpy())
    np.testing.assert_allclose(pool(x, packed)[1].detach(), (w / w.sum()) @ b, rtol=1e-4)


def test_sinusoidal_table_is_the_paper_formula() -> None:
    table = sinusoidal_table(50, 8)
    for p in (0, 1, 49):
        for i in range(4):
            angle = p / 10_000 ** (2 * i / 8)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(p: int, r: int) -> float:
        turned = []
        for x, at in ((q, p), (k, r)):
            angle = rotary_angles(torch.tensor([at]), 8, 10_000.0)[:, None]
            turned.append(rotate(x, angle.cos(), angle.sin()))
        return float((turned[0] * turned[1]).sum())

    assert score(3, 10) == pytest.approx(score(103, 110), rel=1e-4)
    assert score(3, 10) != pytest.approx(score(3, 11), rel=1e-4)
    angles = axial_rotary_angles(torch.tensor([0, 1, 32, 33]), 32, 8, 100.0)
    assert angles[1, :2].tolist() == [0, 0] and angles[2, 2:].tolist() == [0, 0]
    assert angles[1, 2] == 1 and angles[2, 0] == 1 and angles[3, 0] == angles[3, 2] == 1


def test_the_cls_row_of_a_learned_table_is_the_last_and_apart() -> None:
    config = small("model.pooling=cls", "model.positions=learned", "model.num_positions=80")
    model = model_of(config)
    assert model.table is not None and model.table.table.shape[0] == 81
    model(make_batch([5, 9], cls_position=64)).sum().backward()
    used = model.table.table.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [*range(9), 80]


def test_pair_features_are_the_papers() -> None:
    config = small("model.depth=1", recipe="retrieval/smoke")
    model = model_of(config)
    x = torch.randn(4, 16)
    joined = model.join_documents(x)
    expected = torch.cat([x[0::2], x[1::2], x[0::2] * x[1::2], x[0::2] - x[1::2]], 1)
    torch.testing.assert_close(joined, expected)


@pytest.mark.parametrize("recipe", [f"{t}/smoke" for t in ("listops", "text", "retrieval", "image", "pathfinder")])
def test_our_recipes_start_at_ln_of_the_number_of_classes(recipe: str) -> None:
    config = small("model.init=zero_head", recipe=recipe)
    assert first_loss(config) == pytest.approx(math.log(small_classes(recipe)), rel=1e-5)


@pytest.mark.parametrize(
    "recipe", ["listops/nystrom", "text/nystrom", "retrieval/nystrom", "image/nystrom", "listops/google"]
)
def test_published_models_start_near_ln_of_the_number_of_classes(recipe: str) -> None:
    assert first_loss(load_config(recipe)) == pytest.approx(math.log(small_classes(recipe)), rel=0.25)


def small_classes(recipe: str) -> int:
    return get(recipe.split("/")[0]).num_classes


def first_loss(config: RunConfig) -> float:
    model = model_of(config)
    lengths = [64] * 30 * model.documents
    batch = make_batch(lengths, cls_position=64 if model.has_cls else None)
    return F.cross_entropy(model(batch), torch.arange(30) % model.head[-1].out_features).item()


def test_dropout_acts_in_training_only_and_layers_draw_their_own_masks() -> None:
    config = small("model.attention_dropout=0.5", "model.dropout=0.0")
    model = model_of(config)
    batch = make_batch([64, 64])
    assert torch.equal(model(batch), model(batch))
    model.train()
    torch.manual_seed(1)
    a = model(batch)
    torch.manual_seed(1)
    assert torch.equal(a, model(batch))
    assert not torch.equal(a, model(batch))


def test_scalar_input_sees_pixel_values_in_order() -> None:
    config = small("model.input=scalar", recipe="image/smoke")
    model = model_of(config)
    out = model.embed(torch.tensor([0, 127, 128, 255], dtype=torch.uint8))
    weight, bias = model.embed.scale.weight[:, 0], model.embed.scale.bias
    torch.testing.assert_close(out[0], bias - weight)
    torch.testing.assert_close(out[3], bias + weight)
