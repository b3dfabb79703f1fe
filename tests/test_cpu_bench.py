"""Tests of ``python -m bench cpu``: the fp64 results, the bytes of weights, the table and the plot."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib", reason="the report's plots need matplotlib: pip install 'voxkern[bench]'")

from bench.micro import cpu
from bench.micro.modules import demo, head_args
from bench.report import cpu as cpu_report
from bench.report import plots
from bench.report.figures import Figures
from bench.results import WITH_BF16, ResultRow
from voxkern.checkpoint import read_checkpoint
from voxkern.reference.attention import PagedCache

pytestmark = pytest.mark.interpreter("packed weights are for a CPU")


def test_a_model_computes_in_fp64_part_by_part(tiny_folder: Path) -> None:
    model = read_checkpoint(tiny_folder, torch.bfloat16, "cpu").model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    args = {name: t.double() for name, t in head_args(model.acoustic_transformer, 2).items()}
    config = model.backbone_config
    kv = torch.zeros(config.n_layers, 2, 2, config.n_kv_heads, 64, config.head_dim, dtype=torch.float64)
    codes = torch.full((1, 1, 37), 5)

    def run(one: torch.nn.Module) -> list[torch.Tensor]:
        cache = PagedCache(kv.clone(), torch.tensor([[0]], dtype=torch.int32), torch.tensor([1]))
        latents = one.acoustic_transformer.solve(**args, steps=2)
        return [latents, one.hidden_states(one.mm_audio_embeddings.audio_codebook_embeddings(codes), cache)]

    with torch.inference_mode():
        expected = run(copy.deepcopy(model).double())
        with cpu.in_fp64(model):
            found = run(model)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float64
        assert torch.equal(mine, theirs)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def test_the_weights_that_a_frame_reads() -> None:
    head = demo("bf16", "cpu").acoustic_transformer
    layer = 192 * (8 + 2 + 2 + 8) * 32 + 3 * 192 * 512 + 2 * 192  # wq, wk, wv, wo; w1, w2, w3; norms
    in_and_out = 2 * 36 * 192 + 192
    once = 2 * 192 * 192 + head.semantic_codebook_output.weight.numel()
    assert cpu.weights_read(head) == 2 * (7 * (3 * layer + in_and_out) + once)


def test_each_part_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    commands = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=-9 if command[-1] == "frame" else 0)

    monkeypatch.setattr(cpu.subprocess, "run", run)
    assert cpu.main(["--threads", "2", "--csv", "rows.csv"]) == 1
    common = [sys.executable, "-m", "bench", "cpu", "--threads", "2", "--csv", "rows.csv", "--part"]
    assert commands == [[*common, part] for part in ("head", "frame", "voice")]
    assert capsys.readouterr().out == "FAILED: frame\n"
    commands.clear()
    assert cpu.main(["--part", "head", "voice"]) == 0
    assert [command[-1] for command in commands] == ["head", "voice"]


def test_the_table_and_the_picture() -> None:
    rows = [ResultRow("cpu", "copy", f"bandwidth, {n}", 20.0, "GB/s", "measured", "c", "copy", device="A, 2 threads")
            for n in cpu_report.THREADS]  # fmt: skip
    for provider, seconds in (("vllm-omni", 1.2), ("voxkern-packed", 0.4)):
        for metric, value, unit in (("time", 1e6 * seconds, "us"), ("weights read", 4.8 / seconds, "GB/s")):
            rows += [
                ResultRow("cpu", "flow_head", f"{metric}, {n}", value, unit, "measured", "c", provider, "public-b4",
                          device="A, 2 threads")
                for n in cpu_report.THREADS
            ]  # fmt: skip
    with_bf16 = [replace(row, value=row.value / 2, device=f"A{WITH_BF16}, 2 threads", date="later") for row in rows]
    table = cpu_report.on_a_cpu(Figures(rows + with_bf16), with_bf16=False)
    assert table.lines == [
        ["flow head", "4", "vLLM-Omni's module", "1.2", "1.2", "4.0 / 4.0"],
        ["flow head", "4", "packed weights", "0.4", "0.4", "12.0 / 12.0"],
    ]
    assert "reads and writes 20.0 and 20.0 GB a second" in table.note
    table = cpu_report.on_a_cpu(Figures(rows + with_bf16), with_bf16=True)
    assert table.lines[0] == ["flow head", "4", "vLLM-Omni's module", "0.6", "0.6", "2.0 / 2.0"]
    assert table.note.endswith(f"A{WITH_BF16}.")
    plot = cpu_report.head_times(Figures(rows + with_bf16))
    for axes, expected in zip(plot.axes, ([1.2, 0.4], [1.2, 0.4], [0.6, 0.2], [0.6, 0.2]), strict=True):
        assert [bar.get_height() for bars in axes.containers for bar in bars] == pytest.approx(expected)
    assert plots.png(plot).startswith(b"\x89PNG")
