"""What a call launches, seen through a driver that only takes notes: kernels, blocks, shared memory, parameters."""

import contextlib
import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_kernels import BlockLayout, compiler, cuda_ops, families, kernel_call, launcher, pieces

real = pytest.importorskip("cuda.bindings.driver")


class Notes:
    """Stands for cuda.bindings.driver."""

    CUfunction = real.CUfunction
    CUfunction_attribute = real.CUfunction_attribute
    CUlaunchAttribute = real.CUlaunchAttribute
    CUlaunchAttributeID = real.CUlaunchAttributeID
    CUlaunchConfig = real.CUlaunchConfig
    CUstream = real.CUstream

    def __init__(self) -> None:
        self.names: list[str] = []
        self.launches: list[tuple[str, int, int, int]] = []  # kernel, blocks, threads, shared bytes
        self.fields: list[tuple[int | float, ...]] = []
        self.limits: list[int] = []
        self.overlapping: list[str] = []  # kernels that may begin before the one before them has ended
        self.status = 0

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, 1

    def cuLibraryLoadData(self, *arguments: object) -> tuple[int, int]:
        return 0, 5

    def cuLibraryGetKernel(self, library: int, name: bytes) -> tuple[int, int]:
        self.names.append(name.decode().removeprefix("attention_"))
        return 0, len(self.names)

    def cuKernelSetAttribute(self, which: object, value: int, *rest: object) -> tuple[int]:
        self.limits.append(value)
        return (0,)

    def cuLaunchKernel(self, function: object, *arguments: int) -> tuple[int]:
        blocks, _, _, threads, _, _, shared, _, pointers, _ = arguments
        place = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))[0]
        self.fields.append(launcher.PARAMETERS.unpack(ctypes.string_at(place, launcher.PARAMETERS.size)))
        self.launches.append((self.names[int(function) - 1], blocks, threads, shared))
        return (self.status,)

    def cuLaunchKernelEx(self, config: Any, function: object, pointers: int, extra: int) -> tuple[int]:
        (attribute,) = config.attrs
        assert attribute.id == real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert attribute.value.programmaticStreamSerializationAllowed == 1 == config.numAttrs
        self.overlapping.append(self.names[int(function) - 1])  # type: ignore[call-overload]
        grid, block = (config.gridDimX, config.gridDimY, config.gridDimZ), (config.blockDimX, config.blockDimY, 1)
        return self.cuLaunchKernel(function, *grid, *block, config.sharedMemBytes, 0, pointers, 0)

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"out of ideas"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    monkeypatch.setattr(launcher, "_driver", lambda: notes)
    monkeypatch.setattr(compiler, "cubin", lambda plan, arch: b"code")
    limits = SimpleNamespace(shared_memory_per_block_optin=99 * 1024, multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(launcher, "_stream", lambda index: 0)
    for cached in (launcher._loaded, launcher._kernel, launcher._limits, launcher.is_hopper, launcher._ready):
        clear: Callable[[], None] = getattr(cached, "cache_clear", None) or cached.clear
        clear()
    return notes


def run(head_dim: int, deterministic: bool = False, dropout_p: float = 0.0) -> None:
    q = torch.zeros(2, 300, 3, head_dim, dtype=torch.bfloat16)
    seed = torch.tensor([1, 2]) if dropout_p else None
    rule = (None, None, None, 300, 300, seed, dropout_p, 0.5, True)
    out, lse = cuda_ops.flash_forward(q, q, q, *rule)
    cuda_ops.flash_backward(q, q, q, out, lse, q, None, *rule, deterministic)


def test_a_step_launches_four_kernels_over_every_tile_head_and_sample(driver: Notes) -> None:
    run(32)
    assert [name for name, *_ in driver.launches] == ["forward", "preprocess", "backward_keys", "postprocess"]
    assert [blocks for _, blocks, *_ in driver.launches] == [3 * 6, -(-1800 * 4 // 256), 3 * 6, -(-1800 * 8 // 256)]
    for fields in driver.fields:
        batch, heads, len_q, len_k, head_dim, *_, causal = fields[47:56]
        assert (batch, heads, len_q, len_k, head_dim, causal) == (2, 3, 300, 300, 32, 1)
        assert fields[60:] == pytest.approx((0, 0, 0.5, 0.5 * 1.442695, 1.0))


def run_sparse(layout: BlockLayout, deterministic: bool = False, dropout_p: float = 0.0) -> None:
    q = torch.zeros(2, 300, 3, 32, dtype=torch.bfloat16)
    lists = (layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx, layout.head_to_pattern)
    seed = torch.tensor([1, 2]) if dropout_p else None
    rule = (*lists, layout.num_blocks, layout.block_size, None, None, 300, seed, dropout_p, 0.5, True)
    out, lse = cuda_ops.sparse_forward(q, q, q, *rule)
    cuda_ops.sparse_backward(q, q, q, out, lse, q, None, *rule, deterministic)


def test_a_layout_goes_to_the_block_sparse_kernels_by_rows_and_by_columns(driver: Notes) -> None:
    layout = BlockLayout.butterfly(300)
    run_sparse(layout)
    run_sparse(layout, deterministic=True)
    first = ["forward_sparse", "preprocess", "backward_keys_sparse", "postprocess"]
    second = ["forward_sparse", "preprocess", "backward_queries_sparse", "backward_keys_sparse"]
    assert [name for name, *_ in driver.launches] == first + second
    rows = (layout.row_ptr.data_ptr(), layout.col_idx.data_ptr(), layout.head_to_pattern.data_ptr())
    columns = (layout.col_ptr.data_ptr(), layout.row_idx.data_ptr(), layout.head_to_pattern.data_ptr())
    for (name, *_), fields in zip(driver.launches, driver.fields, strict=True):
        assert fields[17:20] == (columns if "keys" in name else rows)
        assert (fields[46], *fields[56:58]) == (0, 5, 64)


def test_heads_with_patterns_of_their_own_are_looked_up(driver: Notes) -> None:
    patterns = [BlockLayout.local(300, window=0, block_size=128), BlockLayout.dense(300, 128)]
    run_sparse(BlockLayout.per_head(patterns, [1, 0, 1]))
    assert all((fields[46], *fields[56:58]) == (1, 3, 128) for fields in driver.fields)


def test_a_layout_with_every_block_goes_to_the_dense_kernels(driver: Notes) -> None:
    dense = BlockLayout.dense(300)
    run_sparse(dense)
    run_sparse(BlockLayout.per_head([dense, dense], [0, 1, 0]))
    assert [name for name, *_ in driver.launches] == ["forward", "preprocess", "backward_keys", "postprocess"] * 2
    assert all(fields[17:20] == (0, 0, 0) for fields in driver.fields)


def test_block_sparse_calls_take_the_hopper_kernels_on_9_0(driver: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    limits = SimpleNamespace(shared_memory_per_block_optin=227 * 1024, multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    run_sparse(BlockLayout.butterfly(300))
    with families.cuda_family("generic"):
        run_sparse(BlockLayout.butterfly(300))
    hopper = ["hopper_forward_sparse", "preprocess", "hopper_backward_sparse", "postprocess"]
    generic = ["forward_sparse", "preprocess", "backward_keys_sparse", "postprocess"]
    assert [name for name, *_ in driver.launches] == hopper + generic
    # Persistent, so one a multiprocessor.
    assert [blocks for name, blocks, *_ in driver.launches if "hopper" in name] == [3, 3]
    # With dropout a block has a piece of work for each of its three teams.
    run_sparse(BlockLayout.butterfly(300, block_size=64), dropout_p=0.1)
    assert driver.launches[-2][:2] == ("hopper_backward_sparse", 10)


def test_dense_calls_have_no_lists(driver: Notes) -> None:
    run(32)
    assert all((*fields[17:20], fields[46], *fields[56:58]) == (0,) * 6 for fields in driver.fields)


def test_deterministic_and_small_shared_memory_take_the_form_without_atomics(driver: Notes) -> None:
    run(32, deterministic=True)
    run(128)
    expected = ["forward", "preprocess", "backward_queries", "backward_keys"]
    assert [name for name, *_ in driver.launches] == expected * 2
    assert all(shared <= 99 * 1024 for *_, shared in driver.launches)


def test_more_than_48_kilobytes_are_asked_for_once(driver: Notes) -> None:
    run(128)
    run(128)
    assert driver.limits and len(driver.limits) == len(set(driver.limits))
    assert set(driver.limits) == {shared for *_, shared in driver.launches if shared > 48 * 1024}


def test_dropout_is_handed_over_as_a_count_of_bytes(driver: Notes) -> None:
    run(16, dropout_p=0.1)
    for fields in driver.fields:
        assert fields[58:60] == ((128 - 26) * 0x01010101, 0xFFFFFFFF)
        assert fields[64] == pytest.approx(256 / 230)


def test_packed_calls_have_a_sequence_more_for_the_rows_after_the_last(driver: Notes) -> None:
    q = torch.zeros(500, 2, 16, dtype=torch.float16)
    cu = torch.tensor([0, 100, 350])
    cuda_ops.flash_forward(q, q, q, None, cu, cu, 10_000, 10_000, None, 0.0, 1.0, False)
    # The bound on the longest sequence is cut to the rows there are: four tiles of 128.
    assert [blocks for _, blocks, *_ in driver.launches] == [4 * 2 * 3]


def on_hopper(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    limits = SimpleNamespace(shared_memory_per_block_optin=227 * 1024, multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)


def test_packed_hopper_calls_order_their_pieces_of_work_first(driver: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch, multiprocessors=3)
    q = torch.zeros(2000, 2, 32, dtype=torch.float16)
    cu = torch.tensor([0, 1000, 1100, 1200, 1300, 1400])
    rule = (None, cu, cu, 1000, 1000, None, 0.0, 1.0, False)
    out, lse = cuda_ops.flash_forward(q, q, q, *rule)
    cuda_ops.flash_backward(q, q, q, out, lse, q, None, *rule, False)
    names = ["order", "hopper_forward", "preprocess", "hopper_backward", "postprocess"]
    assert [name for name, *_ in driver.launches] == names
    # A head: as many tiles as 2,000 rows fill, one more for each of five sequences, the longest one's for rows of none.
    counts = [2 * (2000 // rows + 5 + -(-1000 // rows)) for rows in (256, 192)]
    rows_of_preprocess = -(-2000 * 2 * 4 // 256)
    assert [blocks for _, blocks, *_ in driver.launches][:4] == [1, counts[0], rows_of_preprocess + 1, counts[1]]
    assert [fields[53:55] for fields in driver.fields[:4]] == [(counts[0], 256)] * 2 + [(counts[1], 192)] * 2
    order = [fields[20] for fields in driver.fields]
    assert order[0] == order[1] != 0 and order[2] == order[3] != 0 and order[4] == 0


def test_each_kernel_gets_the_tensors_of_its_call_and_only_those(driver: Notes) -> None:
    q = torch.zeros(2, 40, 3, 16, dtype=torch.bfloat16)
    k = torch.zeros(2, 50, 3, 16, dtype=torch.bfloat16)
    rule = (None, None, None, 40, 50, None, 0.0, 0.5, False)
    out, lse = cuda_ops.flash_forward(q, k, k, *rule)
    forward = driver.fields[0]
    assert forward[:3] == (q.data_ptr(), k.data_ptr(), k.data_ptr())
    # out, dout, out_written, dq, dk, dv, lse, dlse, stats, dq_sums
    assert forward[3:13] == (0, 0, out.data_ptr(), 0, 0, 0, lse.data_ptr(), 0, 0, 0)
    dlse = torch.ones_like(lse)
    dq, dk, dv = cuda_ops.flash_backward(q, k, k, out, lse, q, dlse, *rule, False)
    for (name, *_), fields in zip(driver.launches[1:], driver.fields[1:], strict=True):
        assert fields[3:6] == (out.data_ptr(), q.data_ptr(), 0), name
        assert fields[7:11] == (dk.data_ptr(), dv.data_ptr(), lse.data_ptr(), dlse.data_ptr()), name
        assert fields[30:33] == (40 * 48, 48, 16) and fields[39:42] == (50 * 48, 48, 16), name
        assert (fields[6] == dq.data_ptr()) == (name == "postprocess") and bool(fields[12]) == (name != "preprocess")


def test_a_refused_launch_says_which_kernel(driver: Notes) -> None:
    driver.status = 700
    with pytest.raises(launcher.LaunchError, match=r"launch forward 64 bfloat16 with 18 blocks: out of ideas \(700\)"):
        run(64)


def test_checking_reads_the_offsets_and_names_the_argument(driver: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_call, "CHECK", True)  # what ATTENTION_KERNELS_CHECK=1 sets
    q = torch.zeros(50, 1, 16, dtype=torch.float16)
    cu = torch.tensor([0, 60])
    with pytest.raises(ValueError, match="cu_seqlens_q must end at or before the tensor's 50 rows, got 60"):
        cuda_ops.flash_forward(q, q, q, None, cu, cu, 60, 60, None, 0.0, 1.0, False)
    assert driver.launches == []


def test_persistent_backwards_and_what_follows_them_are_set_up_early(
    driver: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels around them are written for it (csrc/common/overlap.cuh); no other launch may begin early."""
    run(32)
    assert driver.overlapping == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    limits = SimpleNamespace(shared_memory_per_block_optin=227 * 1024, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    for cached in (launcher._limits, launcher.is_hopper):
        cached.cache_clear()
    driver.launches.clear()
    run(32)
    assert [name for name, *_ in driver.launches] == ["hopper_forward", "preprocess", "hopper_backward", "postprocess"]
    assert driver.overlapping == ["hopper_backward", "postprocess"]
    run(32, deterministic=True)
    run(64)
    run(16)
    assert driver.overlapping == ["hopper_backward", "postprocess"]


@pytest.mark.parametrize("case", ["fixed", "causal", "key_lengths", "packed"])
def test_hopper_backward_gets_keys_in_two_sizes_where_all_are_worth_the_same(
    driver: Notes, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    on_hopper(monkeypatch, multiprocessors=32)
    q = torch.zeros(2, 1000, 3, 32, dtype=torch.bfloat16)
    lengths = torch.tensor([1000, 900]) if case == "key_lengths" else None
    offsets = torch.tensor([0, 1000, 2000], dtype=torch.int32) if case == "packed" else None
    q = q.flatten(0, 1) if case == "packed" else q
    rule = (lengths, offsets, offsets, 1000, 1000, None, 0.0, 0.5, case == "causal")
    out, lse = cuda_ops.flash_forward(q, q, q, *rule)
    cuda_ops.flash_backward(q, q, q, out, lse, q, None, *rule, False)
    at = {name: fields for (name, *_), fields in zip(driver.launches, driver.fields, strict=True)}
    tiles, count, rows = at["hopper_backward"][52:55]
    parts, part = at["hopper_backward"][60:62]
    assert rows == 192
    if case == "fixed":
        assert (tiles, parts, part) == pieces.cut(1000, 6, 192, 32) and parts > 0
        assert count == (tiles + parts) * 6
    else:
        assert (tiles, parts, part) == (6, 0, 0)
    assert at["hopper_forward"][60:62] == at["postprocess"][60:62] == (0, 0)
