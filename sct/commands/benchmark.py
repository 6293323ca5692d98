"""Benchmark a model against reference baselines, on cells that it was not trained on.

    sct benchmark --config=benchmark --config.model=runs/mine --config.data.path=cells.h5ad
    sct benchmark --config=benchmark --config.model=runs/mine --config.data.path=STORE --output=runs/results
    sct benchmark --config=benchmark:quick --config.model=runs/mine --config.data.path=cells.h5ad
    sct benchmark --config=benchmark_peft --config.model=runs/mine --config.data.path=labeled.h5ad
    sct benchmark --config=benchmark_zeromics --config.model=runs/zeromics_llm --config.data.path=cells.h5ad

Measures imputation of genes and of whole cells, and embeddings if the cells have labels; every method gets the same
cells and the same masked positions. With --config=benchmark_zeromics, the command measures zero-shot and few-shot
answers to questions about cells. With --config=benchmark_peft, it fine-tunes the model for cell types with several
methods. Writes report.html, report.md, report.json and results.json to the folder --output;
--overwrite replaces an existing report. Any field of the configuration is set by --config.section.field=value. In a
clone, `python -m launch.benchmark` is the same program.
"""

from __future__ import annotations

import importlib

from absl import flags
from ml_collections import config_flags

from sct import messages
from sct.commands import output_flags
from sct.commands.configuration import prepare
from sct.commands.flag_errors import FlagError
from sct.errors import AGAIN, TrainingStoppedError
from sct.global_settings import HINTS, settings

__all__ = ["main", "prepare"]

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration: a file, or the name of one that sct provides; optionally with :VARIANT.",
)
flags.mark_flag_as_required("config")

_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder to write the report to. Default: the folder in the configuration, such as runs/benchmark.",
)

# Modules by the value of `benchmark` in a configuration.
_BENCHMARKS = {
    "zero_shot": "sct.benchmarks.zero_shot", "instructions": "sct.benchmarks.instructions",
    "peft": "sct.benchmarks.peft",
}  # fmt: skip
FLAG_MODULES = ("sct.commands.output_flags", "sct.commands.device_flag")
RENAMED_FLAGS = {"config.output": "output"}


def main(argv: list[str]) -> int:
    """Run the benchmark of the configuration, write the report, and print its summary; return the exit status."""
    from sct.eval.reports.summary import summary

    config = _CONFIG.value.to_dict()
    if _OUTPUT.value:
        config["output"] = _OUTPUT.value
    name = config.pop("benchmark", "zero_shot" if "gene_imputation" in config else "")
    if name not in _BENCHMARKS:
        raise FlagError("--config does not name a benchmark configuration: write --config=benchmark.")
    try:
        reports = importlib.import_module(_BENCHMARKS[name]).benchmark(
            config, overwrite=output_flags.OVERWRITE.value
        )
    except TrainingStoppedError as stopped:
        messages.notice(str(stopped))
        return AGAIN if stopped.reason == "signal" else 0
    console, compared = messages.console(), summary(reports)
    if compared is not None:
        console.print(compared)
    if compared is None or settings.verbosity >= HINTS:
        for report in reports:
            console.print(report.table())
    console.print(f"report: {config['output']}/report.html", soft_wrap=True, highlight=False)
    return 0
