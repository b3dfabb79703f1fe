"""Tests of the codec's kernels: errors for wrong arguments, and planted faults that the accuracy check must catch."""

import pytest
import torch
from checks import assert_accurate, moved
from plant import Edit, case_of, entry_of, plant

from bench.ops.registry import TensorMaker


@pytest.mark.parametrize(
    ("operator", "case", "edit"),
    [
        pytest.param("codec_conv", "odd", ("p_row, m_row = _row_pointers(p_x, p_old, i_b, b_t - N_PAST + tap, b_fresh",
                     "p_row, m_row = _row_pointers(p_x, p_old, i_b, b_t - N_PAST + tap, b_fresh & False"),
                     id="no first row"),
        pytest.param("codec_conv", "odd-reflect", ("b_padded = -b_t", "b_padded = -b_t - 1"), id="reflected beside"),
        pytest.param("codec_conv", "odd", ("tl.where((b_t < valid)[None, :], b_acc, 0.0)", "b_acc"), id="no silence"),
        pytest.param("codec_conv", "odd", ("* rate - N_PAST + o_r", "* rate - N_PAST - 1 + o_r"), id="a row too old"),
        pytest.param("codec_attention", "odd", ("& (b_far >= -WINDOW)", "& (b_far > -WINDOW)"), id="a key less"),
        pytest.param("codec_attention", "odd", ("& (b_t >= -past)", ""), id="keys from before the first"),
        pytest.param("codec_attention", "odd", ("valid - WINDOW + o_r", "T - WINDOW + o_r"), id="keeps too much"),
        pytest.param("codec_attention", "odd", ("tl.exp2(-8.0 * i_h", "tl.exp2(-8.0 * (i_h + 1)"), id="other slopes"),
        pytest.param("codec_dequantise", "odd", ("tl.load(p_usage + semantic).to(tl.float32), 1e-5)",
                     "tl.load(p_usage + semantic).to(tl.float32), 1e-2)"), id="another floor of usage"),
    ],
)  # fmt: skip
def test_a_fault_is_caught(operator: str, case: str, edit: Edit, device: torch.device) -> None:
    entry = entry_of(operator)
    with pytest.raises(AssertionError):
        assert_accurate(plant(entry, edit), case_of(entry, case), "fp32", device=device)


@pytest.mark.parametrize(
    ("operator", "changes", "named"),
    [
        ("codec_conv", {"pad_mode": "wrap"}, "pad_mode must be one of zero, replicate, reflect"),
        ("codec_conv", {"rate": 2}, "x has 15 rows, but each of 5 requests must have 1 or more frames of 2 rows"),
        ("codec_conv", {"parity": torch.zeros(2, dtype=torch.int32)}, r"parity is \[2\] but must be \[1\]"),
        ("codec_conv", {"past_frames": torch.zeros(4, dtype=torch.int64)}, r"past_frames is \[4\] but must be \[5\]"),
        ("codec_conv", {"conv_state": torch.zeros(2, 65, 6, 75)}, r"past_frames is \[5\] but must be \[65\]"),
        (
            "codec_update_state",
            {"past_frames": torch.zeros(65, dtype=torch.int64)},
            r"past_frames has 65 rows but must have 1 per request, for 1\.\.64 requests$",
        ),
        ("codec_attention", {"n_heads": 7}, r"which are no multiple of 3 \* 7"),
        ("codec_attention", {"kv_window": torch.zeros(2, 2, 3, 17, 72)}, r"a window of 17 but must have 1\.\.16"),
        ("codec_attention", {"rate": 0}, r"1 or more frames of 0 rows \(rate >= 1\)"),
        (
            "codec_dequantise",
            {"new_frames": torch.zeros(2, dtype=torch.int64)},
            r"new_frames is \[2\] but must be \[3\]",
        ),
    ],
)
def test_wrong_arguments(operator: str, changes: dict, named: str, device: torch.device) -> None:
    entry = entry_of(operator)
    args = entry.args(case_of(entry, "odd"), TensorMaker(device=str(device)))
    with pytest.raises(ValueError, match=named):
        entry.op(**(args | moved(changes, device)))


def test_too_few_rows_to_reflect_about(device: torch.device) -> None:
    entry = entry_of("codec_conv")
    args = entry.args(case_of(entry, "odd-reflect"), TensorMaker(device=str(device)), rate=4)
    with pytest.raises(ValueError, match="rate is 4 but must be more than 6"):
        entry.op(**args)


def test_sound_from_half_precision(device: torch.device) -> None:
    """The last convolution reads bf16 rows and multiplies them in fp32 by an fp32 weight."""
    entry = entry_of("codec_conv")
    case = case_of(entry, "odd-reflect")
    args = entry.args(case, TensorMaker(torch.bfloat16, str(device)))
    args |= {"weight": args["weight"].float(), "y": args["y"].float()}
    expected = {name: a.clone() if isinstance(a, torch.Tensor) else a for name, a in args.items()}
    entry.op(**args)
    entry.reference(**expected)
    torch.testing.assert_close(args["y"], expected["y"], rtol=1e-5, atol=1e-5)
    assert torch.equal(args["conv_state"], expected["conv_state"])
