"""tools/estimate_gpu.py: its sums and assumptions, and what it refuses. Compiling for a GPU takes other packages."""

from __future__ import annotations

import json

import pytest

from sct.models.sct import SCT
from sct.models.sct_config import SCTConfig
from sct.speed.gpu_targets import TARGETS
from tests.speed.test_kernels import PROGRAM
from tools import estimate_gpu

TINY = {
    "num_genes": 2, "token_embed_dim": 32, "embed_dim": 32, "num_heads": 2, "ffn_dim": 8, "num_downsamples": 1,
    "num_layers": 1,
}  # fmt: skip
NEEDS = {
    "temporaries_bytes": 3 << 30, "arguments_bytes": 2 << 30, "outputs_bytes": 1 << 30, "aliased_bytes": 1 << 29,
}  # fmt: skip


def test_an_estimate_of_a_saved_program(tmp_path, capsys):
    saved = tmp_path / "step.hlo"
    saved.write_text(f"// memory: {json.dumps(NEEDS)}\n{PROGRAM}")
    words = [f"--program={saved}", f"--model={json.dumps(TINY)}", "--cells=1", "--mode=forward"]

    def run(*more: str, ok: bool = True) -> dict[str, float]:
        assert estimate_gpu.main([*words, *more]) == (0 if ok else 1)
        output = capsys.readouterr()
        if not ok:
            return {"error": output.err}
        line, _, tables = output.out.partition("\n")
        assert "| matrix product | 1 |" in tables
        return json.loads(line)

    found = run()
    flops = SCT.flops(SCTConfig(**TINY), 1, 1)
    counted = 1024 + 3 * 256_000
    assert found["tflop"] == pytest.approx(counted / 1e12)
    assert found["formula_tflop"] == pytest.approx(flops / 1e12)
    assert found["planned_gib"] == 5.5
    assert found["estimated_tokens_per_s"] == pytest.approx(2 / found["estimated_seconds"])
    peak = TARGETS["h200"].flops
    assert found["estimated_share_of_peak"] == pytest.approx(flops / found["estimated_seconds"] / peak)
    assert found["estimated_share_of_products"] == pytest.approx(found["estimated_share_of_peak"] / 0.8)
    # All kernels of this program wait for memory, so only the bandwidth changes the estimate.
    assert run("--peak_tflops=2000")["estimated_seconds"] == pytest.approx(found["estimated_seconds"])
    assert run("--bandwidth_tb=2.4")["estimated_seconds"] == pytest.approx(2 * found["estimated_seconds"])
    a100 = run("--target=a100", "--peak_tflops=1e-6")
    assert a100["estimated_seconds"] > 1e3 * found["estimated_seconds"]
    assert a100["device_gib"] < found["device_gib"]
    # A program of another size, and a file that is no saved program.
    assert "--batch" in run("--batch=4000", ok=False)["error"]
    saved.write_text(PROGRAM)
    assert "--save" in run(ok=False)["error"]
    assert "--save" in run(f"--program={tmp_path / 'absent'}", ok=False)["error"]
