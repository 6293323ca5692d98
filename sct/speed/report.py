"""Show a speed measurement as a table, and write it as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sct.atomic import write_json
from sct.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

# If the two measurements of the ceiling differ by more than this fraction, other programs disturbed the machine.
_DISTURBED = 0.1
_UNITS = {
    "step_seconds": "s", "step_cpu_seconds": "s", "input_wait_seconds": "s", "compile_seconds": "s",
    "trace_seconds": "s", "first_call_seconds": "s", "first_batch_seconds": "s",
    "model_flops": "FLOP", "compiled_flops": "FLOP",
    "achieved_flops": "FLOP/s", "ceiling_flops": "FLOP/s", "utilisation": "",
    "tokens_per_s": "/s", "cells_per_s": "/s", "cells_per_cpu_s": "/s", "raw_cells_per_s": "/s",
    "raw_cells_per_cpu_s": "/s",
    "peak_host_bytes": "B", "peak_device_bytes": "B", "temporaries_bytes": "B",
    "save_blocked_seconds": "s", "checkpoint_interval_seconds": "s", "saved_bytes": "B",
    "generated_tokens_per_s": "/s", "sampled_tokens_per_s": "/s", "transformers_greedy_tokens_per_s": "/s",
    "transformers_sampled_tokens_per_s": "/s", "weights_bytes_per_s": "B/s", "memory_ceiling_bytes_per_s": "B/s",
    "utilisation_of_memory": "", "disk_read_bytes_per_s": "B/s", "store_bytes_per_s": "B/s", "input_bytes_per_s": "B/s",
}  # fmt: skip
_NAMES = {
    "step_seconds": "time of a step (median)",
    "step_cpu_seconds": "CPU time of a step",
    "input_wait_seconds": "waiting for the input of a step",
    "compile_seconds": "compilation",
    "trace_seconds": "tracing",
    "first_call_seconds": "first call, with compilation",
    "first_batch_seconds": "first batch after opening the store",
    "generated_tokens_per_s": "generated tokens, greedy",
    "transformers_greedy_tokens_per_s": "generated tokens, greedy, transformers with torch",
    "sampled_tokens_per_s": "generated tokens, sampled",
    "transformers_sampled_tokens_per_s": "generated tokens, sampled, transformers with torch",
    "weights_bytes_per_s": "weights read",
    "memory_ceiling_bytes_per_s": "ceiling: product of a few rows and a large matrix",
    "utilisation_of_memory": "weights read / ceiling",
    "tokens_per_s": "gene tokens",
    "cells_per_s": "cells",
    "cells_per_cpu_s": "cells per second of CPU time",
    "raw_cells_per_s": "cells in raw blocks",
    "raw_cells_per_cpu_s": "cells in raw blocks per second of CPU time",
    "model_flops": "operations of a step, by formula",
    "compiled_flops": "operations of a step, counted by XLA",
    "achieved_flops": "achieved operations per second",
    "ceiling_flops": "ceiling: a large matrix product",
    "utilisation": "achieved / ceiling",
    "peak_host_bytes": "peak memory of the process",
    "peak_device_bytes": "peak memory of a device",
    "temporaries_bytes": "temporary memory of the compiled step",
    "save_blocked_seconds": "time that training waits for a save",
    "saved_bytes": "size of a checkpoint",
    "checkpoint_interval_seconds": "shortest interval between saves at a cost of 2%",
    "disk_read_bytes_per_s": "sequential read of the same files",
    "store_bytes_per_s": "stored bytes read in raw blocks",
    "input_bytes_per_s": "bytes of the input file read",
}


def quantity(value: float | None, unit: str) -> str:
    """Format a number with its unit: "3.21 s", "4.14 TFLOP", "12.3 GiB"; "-" for None."""
    if value is None:
        return "-"
    if unit == "":
        return f"{value:.3f}"
    if unit == "s":
        return f"{value:.4g} s" if value < 1000 else f"{value:,.0f} s"
    if unit == "/s" and value < 1e6:
        return f"{value:,.0f} /s" if value >= 100 else f"{value:.3g} /s"
    step, signs = (
        (1024.0, ("", "Ki", "Mi", "Gi", "Ti", "Pi"))
        if unit[0] == "B"
        else (1000.0, ("", "k", "M", "G", "T", "P"))
    )
    power = 0
    while abs(value) >= step and power < len(signs) - 1:
        value, power = value / step, power + 1
    if unit == "/s":
        return f"{value:.3g} {({'M': 'million', 'G': 'billion'}).get(signs[power], signs[power])} /s"
    return f"{value:.3g} {signs[power]}{unit}"


def summary(found: Mapping[str, Any]) -> str:
    """Return one line: the time of a step, the throughput, and the percentage of the machine's limit that is reached.

    Values that were not measured are left out.
    """
    parts = [f"{quantity(found['step_seconds'], 's')} per step"] if "step_seconds" in found else []
    rates = {
        "tokens_per_s": "gene tokens",
        "cells_per_s": "cells",
        "generated_tokens_per_s": "generated tokens",
    }
    for name, what in rates.items():
        if found.get(name):
            parts.append(f"{quantity(found[name], '/s').removesuffix(' /s')} {what}/s")
            break
    for name, limit in (("utilisation", "the limit"), ("utilisation_of_memory", "the limit of memory")):
        if found.get(name):
            parts.append(f"{found[name]:.0%} of {limit} of this machine")
            break
    return f"{found['mode']}: {', '.join(parts) or 'see the table'}"


def table(found: Mapping[str, Any]) -> Table:
    """Return a `rich` table of a measurement."""
    from rich.table import Table

    where = f"{found['cpu_count']} cores, {found['cpu']}" if found["platform"] == "cpu" else found["device"]
    if found.get("devices_used", 1) > 1:
        where = f"{found['devices_used']} devices, {where}"
    shown = Table(title=f"{found['mode']} on {where}", title_justify="left", show_header=False)
    shown.add_column("what", overflow="fold")
    shown.add_column("value", justify="right", no_wrap=True)
    shown.add_column("remark", overflow="fold")
    for name, label in _NAMES.items():
        if name in found:
            shown.add_row(label, quantity(found[name], _UNITS[name]), _remark(name, found))
    return shown


def _remark(name: str, found: Mapping[str, Any]) -> str:
    if name == "step_seconds":
        low, high = found["step_seconds_spread"]["min"], found["step_seconds_spread"]["max"]
        return f"{quantity(low, 's')} to {quantity(high, 's')} in {len(found['step_seconds_all'])}"
    if name == "ceiling_flops":
        both = (quantity(found[f"ceiling_{when}_flops"], "FLOP/s") for when in ("before", "after"))
        return f"{found['arithmetic']}, {found['ceiling_matrix_size']:,} wide; {' before, '.join(both)} after"
    if name == "tokens_per_s" and "tokens_per_step" in found:
        return (
            f"{found['tokens_per_step']:,} a step: {found['batch_size']} x {found['cells_per_bag']} cells x "
            f"{found['gene_positions']:,} genes"
        )
    if name == "generated_tokens_per_s":
        prompts = f"{found['batch_size']} prompts of up to {found['prompt_tokens']} tokens"
        return f"{prompts}, {found['new_tokens']} generated tokens each"
    if name == "sampled_tokens_per_s":
        return "temperature 0.7, top-p 0.9"
    if name == "compiled_flops":
        return "counts loop bodies once and no library calls"
    if name == "peak_host_bytes":
        return str(found["peak_host_from"])
    if name == "disk_read_bytes_per_s":
        return f"from {found['disk_read_from']}" if found["disk_read_from"] != "unknown" else ""
    return ""


def notes(found: Mapping[str, Any]) -> list[str]:
    """Return notes on a measurement: the comparison with the reference implementation, synthetic cells and warnings."""
    check = found["check"]
    differences = ", ".join(
        f"{name} {value:.1e} (limit {check['limits'][name]:.1e})"
        for name, value in check["differences"].items()
    )
    bags = f" on bags of {check['cells_per_bag']:,} cells" if "cells_per_bag" in check else ""
    lines = [f"Compared with the reference implementation{bags}, difference in relative norm: {differences}."]
    if found.get("synthetic"):
        made = found["synthetic"]
        lines.append(
            f"Measured on {made['cells']:,} synthetic cells with {made['expressed_genes_of_a_cell']:,} expressed genes "
            "on average."
        )
    before, after = found.get("ceiling_before_flops"), found.get("ceiling_after_flops")
    if before and after and abs(before - after) > _DISTURBED * max(before, after):
        lines.append(
            "The ceiling changed by more than 10% during the measurement: other programs may have used the machine, so "
            "measure again."
        )
    return lines


def write(found: Mapping[str, Any], path: Path) -> None:
    """Write the measurement to a JSON file, which appears only when it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except OSError as error:
        raise ConfigError(
            f"--output={path} cannot be written ({error.strerror or error}): choose another path."
        ) from error
