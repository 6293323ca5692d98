"""`sct.settings`, what is printed at each verbosity, and progress displays."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sct
from sct import devices, messages, progress
from sct.errors import ConfigError
from sct.global_settings import Settings, settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def verbosity():
    before = settings.verbosity
    yield
    settings.verbosity = before


def test_settings_take_what_they_document_and_refuse_the_rest(tmp_path, monkeypatch):
    made, wrong = Settings(), []
    for value, level in ((0, 0), ("errors", 0), ("Warning", 1), (2, 2), ("hints", 3), ("debug", 3)):
        made.verbosity = value
        wrong += [value] if made.verbosity != level else []
    (tmp_path / "file").write_text("")
    refused = (
        ("verbosity", 4), ("verbosity", -1), ("verbosity", True), ("verbosity", "loud"), ("verbosity", 1.0),
        ("cache_dir", ""), ("cache_dir", None), ("cache_dir", tmp_path / "file"), ("device", "cuda:0"),
        ("device", None), ("cache_dir", "~nobody_has_this_name/x"),
    )  # fmt: skip
    for name, value in refused:
        try:
            setattr(made, name, value)
        except ConfigError as error:
            if f"settings.{name}" in str(error):
                continue
        wrong.append((name, value))
    assert not wrong
    assert made.verbosity == 3
    with pytest.raises(AttributeError, match="verbosity, cache_dir, device"):
        made.verbos = 1
    monkeypatch.setenv("SCT_CACHE_DIR", str(tmp_path / "of the environment"))
    assert made.cache_dir == tmp_path / "of the environment"
    monkeypatch.setenv("SCT_CACHE_DIR", "~nobody_has_this_name/x")
    with pytest.raises(ConfigError, match="SCT_CACHE_DIR"):
        _ = made.cache_dir
    made.cache_dir = tmp_path / "mine"
    assert made.cache_dir == tmp_path / "mine"
    assert str(tmp_path / "mine") in repr(made)
    assert sct.settings is settings


def test_the_table_of_settings_fits_the_terminal():
    lines = repr(Settings()).splitlines()
    assert [line.split()[0] for line in lines] == ["sct.settings", "verbosity", "cache_dir", "device"]
    assert max(map(len, lines)) <= 80


DEVICES = """
import os
import sct
sct.settings.device = "cpu"
import jax
assert jax.config.jax_platforms == "cpu"
assert jax.default_backend() == sct.settings.device == "cpu"
try:
    sct.settings.device = "tpu"
except sct.SctError as error:
    print(error)
print(sct.settings.device, os.environ["JAX_PLATFORMS"], jax.config.jax_platforms)
"""


def test_the_device_is_chosen_before_jax_starts():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    refusal, device = done.stdout.splitlines()
    assert "tpu" in refusal
    assert "1 CPU device" in refusal
    assert "start Python again" in refusal
    assert device == "cpu cpu cpu"


def test_a_refused_device_changes_nothing(monkeypatch):
    import jax

    monkeypatch.setattr(devices, "check", lambda *arguments, **options: pytest.fail("no such device"))
    before = jax.config.jax_platforms
    for variable in (None, "cpu"):
        if variable is None:
            monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        else:
            monkeypatch.setenv("JAX_PLATFORMS", variable)
        with pytest.raises(pytest.fail.Exception):
            settings.device = "gpu"
        assert os.environ.get("JAX_PLATFORMS") == variable
        assert jax.config.jax_platforms == before
    assert settings.device == "auto"


def test_each_level_prints_its_own_and_those_below(verbosity, capsys):
    found = []
    for level in range(4):
        settings.verbosity = level
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            messages.warn("a warning")
        messages.info("a result")
        messages.notice("a notice")
        messages.hint("a hint")
        messages.console().print("a table")
        with progress.progress("counting", 2, interval=0) as bar:
            bar.update()
            bar.write("between")
            bar.update()
        out, err = capsys.readouterr()
        found.append(
            (len(warned), "a result" in out and "a table" in out, "a notice" in err, "a hint" in err)
        )
        assert ("counting 2/2" in err and "between" in err) == (level > 1)
        assert level > 1 or not out + err
    assert found == [
        (0, False, False, False), (1, False, False, False), (1, True, True, False), (1, True, True, True),
    ]  # fmt: skip
    assert warned[0].filename == __file__


def test_text_of_the_user_is_printed_unchanged(monkeypatch, capsys):
    """A path or an error message is not markup of rich."""
    text = "runs/[old]/a[/b] :smile: [bold]"
    console = messages.console()
    console.print(text, soft_wrap=True)
    console.rule(text)
    assert capsys.readouterr().out.count(text) == 2
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress(text, 2) as bar:
        bar.update(1, note=text)
        bar.write(text)
    assert terminal.getvalue().count("[old]") >= 3
    for notebook in (False, True):
        monkeypatch.setattr(messages, "in_notebook", lambda answer=notebook: answer)
        messages.console().print(text, soft_wrap=True)
        assert text in capsys.readouterr().out


class Clock:
    """A clock that only the test moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_the_time_left_does_not_count_the_compilation(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    bar = progress.ProgressBar("training", 101, 0, 1e9)
    assert bar._left(clock.now) is None
    clock.now += 1000  # the first step compiles
    bar.update()
    assert bar._left(clock.now) is None, "one step after a compilation tells no rate"
    for _ in range(10):
        clock.now += 2
        bar.update()
    assert bar._left(clock.now) == pytest.approx(90 * 2)
    clock.now += 500  # another program is compiled
    bar.restart_clock()
    bar.update()
    clock.now += 3
    bar.update()
    assert bar._left(clock.now) == pytest.approx(88 * 3)
    assert bar._line(clock.now) == "training 13/101, 4:24 left"


def test_a_log_file_gets_ever_rarer_lines_and_a_last_one(monkeypatch):
    clock, err = Clock(), io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(sys, "stderr", err)
    with progress.progress("embedding cells", 86_400) as bar:
        for _ in range(86_400):
            clock.now += 1
            bar.update()
    lines = err.getvalue().splitlines()
    assert lines[0].startswith("embedding cells 15/86400, 23:59:45 left")
    assert lines[-1] == "embedding cells 86400/86400 in 24:00:00"
    assert 280 < len(lines) < 450
    err.truncate(0)
    with progress.progress("a short task", 3) as bar:
        bar.update(3)
    assert not err.getvalue().strip("\0")


CELL = """
import sys, types
class Handle:
    def update(self, content, raw): shown.append(content["text/plain"])
def display(content, raw, display_id):
    shown.append(content["text/plain"])
    return Handle()
shown = []
ipython = types.ModuleType("IPython")
ipython.get_ipython = lambda: types.SimpleNamespace(kernel=1)
sys.modules["IPython"] = ipython
sys.modules["IPython.display"] = types.SimpleNamespace(display=display)
from sct import messages, progress
now = [0.0]
progress.time = types.SimpleNamespace(monotonic=lambda: now[0])
with progress.progress("embedding cells", 10) as bar:
    for _ in range(10):
        now[0] += 0.5
        bar.update()
with progress.progress("short", 10) as bar:
    bar.update(10)
print(shown)
from rich.table import Table
table = Table("a", "b")
table.add_row("[bold]x", "y")
messages.console().print(table)
"""


def test_a_notebook_gets_one_line_that_is_replaced_and_no_control_sequences():
    done = subprocess.run(
        [sys.executable, "-c", CELL], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "FORCE_COLOR": "1", "JPY_PARENT_PID": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "\x1b" not in done.stdout
    shown = eval(done.stdout.splitlines()[0])
    assert shown[-1] == "embedding cells 10/10 in 0:05"
    assert all(line.startswith("embedding cells ") for line in shown)
    assert 3 < len(shown) < 7


def test_everything_that_prints_obeys_the_settings():
    """Commands whose output is their result print by themselves, and `sct.cli` prints errors."""
    free = {"messages.py", "progress.py", "cli.py", "commands/doctor.py", "commands/models.py"}
    found = []
    for path in sorted((ROOT / "sct").rglob("*.py")):
        if (name := path.relative_to(ROOT / "sct").as_posix()) in free:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            of_a_name = called == "warnings.warn" and "FutureWarning" in ast.unparse(node)
            measures = called == "Console" and name == "terminal.py"
            prints = called in ("print", "warnings.warn", "Console", "sys.stderr.write")
            if prints and not of_a_name and not measures:
                found.append(f"{name}:{node.lineno} calls {called}")
    assert not found


def test_a_warning_names_the_line_of_the_user():
    """The library is several calls deep, but the warning names the code that called it."""
    from sct.data.class_prior import ClassPrior

    with pytest.warns(UserWarning, match="masking") as caught:
        ClassPrior.of({}).warn()
    assert [each.filename for each in caught] == [__file__]
