"""Rows of weights as bytes: what goes in comes out, to the bit or to half a step of int8."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softprompt_dist.backbone.flat_weights import FrozenBlock
from softprompt_dist.backbone.formats import Int8Rows, PlainRows


def rows_of(num_rows: int = 7, num_columns: int = 33, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 6, num_rows)[:, None]
    return torch.randn(num_rows, num_columns, generator=generator) * sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_rows_are_the_numbers_themselves(dtype: torch.dtype) -> None:
    values_RC = rows_of()
    bytes_RN = PlainRows(dtype).encode(values_RC)
    assert bytes_RN.shape == (7, PlainRows(dtype).row_bytes(33)) == (7, 33 * dtype.itemsize)
    assert torch.equal(bytes_RN.view(dtype), values_RC.to(dtype))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_off_by_half_a_step_at_most(stored: torch.dtype) -> None:
    sizes_to_hold = 1 if stored == torch.float16 else 0
    values_RC = (rows_of()[2 * sizes_to_hold : 7 - 2 * sizes_to_hold]).to(stored)
    bytes_RN = Int8Rows().encode(values_RC)
    assert bytes_RN.dtype == torch.uint8
    assert bytes_RN.shape[1] == Int8Rows().row_bytes(33) == 37
    quantized_RC, scale_R = Int8Rows.split(bytes_RN)
    assert (quantized_RC.dtype, scale_R.dtype) == (torch.int8, torch.float32)
    values_RC = values_RC.double()
    torch.testing.assert_close(scale_R.double(), values_RC.abs().amax(1) / 127, rtol=1e-6, atol=0)
    error_RC = (quantized_RC.double() * scale_R.double()[:, None] - values_RC).abs()
    assert (error_RC <= scale_R.double()[:, None] * (0.5 + 1e-5)).all()
    assert (quantized_RC.int().abs().amax(1) == 127).all(), "the whole range is used"


def test_a_row_of_zeros_stays_zero_and_leaves_its_neighbours_alone() -> None:
    values_RC = rows_of()
    values_RC[3] = 0
    bytes_RN = Int8Rows().encode(values_RC)
    assert not bytes_RN[3].any()
    for row in (2, 4):
        assert torch.equal(bytes_RN[row], Int8Rows().encode(values_RC[row : row + 1])[0])
    product_R = Int8Rows().multiply(torch.randn(2, 33), bytes_RN)
    assert product_R.isfinite().all()
    assert not product_R[:, 3].any()


@pytest.mark.parametrize("format", [Int8Rows(), PlainRows(torch.bfloat16)])
def test_a_row_does_not_depend_on_the_others(format: Int8Rows | PlainRows) -> None:
    """So that a rank may encode the rows it holds and no other."""
    values_RC = rows_of()
    whole_RN = format.encode(values_RC)
    assert torch.equal(torch.cat([format.encode(row[None]) for row in values_RC]), whole_RN)


def test_joining_what_was_split_is_exact() -> None:
    bytes_RN = Int8Rows().encode(rows_of())
    assert torch.equal(Int8Rows.join(*Int8Rows.split(bytes_RN)), bytes_RN)


def test_numbers_that_int8_can_hold_are_kept_exactly() -> None:
    integers_RC = torch.randint(-127, 128, (5, 20))
    integers_RC[:, 0] = 127
    quantized_RC, scale_R = Int8Rows.split(Int8Rows().encode(integers_RC * 0.25))
    assert torch.equal(quantized_RC.int(), integers_RC.int())
    assert torch.equal(scale_R, torch.full((5,), 0.25))


def test_weights_of_a_block_do_not_overlap_and_start_aligned() -> None:
    block = FrozenBlock(nn.Identity())
    for index, (rows, columns) in enumerate([(3, 5), (1, 1), (7, 13)]):
        block.add_slot(f"plain {index}", PlainRows(torch.float32), rows, columns)
        block.add_slot(f"int8 {index}", Int8Rows(), rows, columns)
    ends = [0, *(slot.end for slot in block.slots)]
    for slot, end_before in zip(block.slots, ends, strict=False):
        assert end_before <= slot.start < end_before + 64
        assert slot.start % 64 == 0
        assert slot.end - slot.start == slot.num_rows * slot.row_bytes
    assert block.num_bytes == ends[-1]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("format", [Int8Rows(), PlainRows(torch.float32)])
def test_parts_of_any_size_make_the_whole(format: Int8Rows | PlainRows, parts: int) -> None:
    """Wherever a run of bytes is cut, the rows that each part touches hold all its bytes."""
    block = FrozenBlock(nn.Identity())
    matrices = {"one": rows_of(5, 7), "two": rows_of(1, 3), "three": rows_of(11, 2)}
    for name, values_RC in matrices.items():
        block.add_slot(name, format, *values_RC.shape)
    run = torch.full((block.num_bytes,), 255, dtype=torch.uint8)
    size = -(-block.num_bytes // parts)
    written = torch.zeros(block.num_bytes, dtype=torch.int64)
    for first_byte in range(0, block.num_bytes, size):
        last_byte = min(block.num_bytes, first_byte + size)
        for slot in block.slots:
            for rows in slot.pieces(first_byte, last_byte):
                start, end = slot.place(rows, first_byte, last_byte)
                encoded = format.encode(matrices[slot.name][rows.start : rows.stop]).view(-1)
                skipped = start - slot.start - rows.start * slot.row_bytes
                run[start:end] = encoded[skipped : skipped + end - start]
                written[start:end] += 1
    block.hold(nn.Parameter(run, requires_grad=False))
    for slot in block.slots:
        assert torch.equal(slot.bytes_RN, format.encode(matrices[slot.name]))
        assert (written[slot.start : slot.end] == 1).all()
