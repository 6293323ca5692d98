"""The scripts for clusters: their commands fit the flags, and a job goes back into the queue when it should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_lines import commands, errors

ROOT = Path(__file__).resolve().parents[2]
SLURM, TPU = ROOT / "launch" / "slurm", ROOT / "launch" / "tpu"
SCRIPTS = [SLURM / "train.sh", TPU / "train.sh"]
TEXTS = [*SCRIPTS, SLURM / "README.md", TPU / "README.md"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_the_scripts_are_sound(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_every_command_fits_the_flags():
    found = [command for path in TEXTS for command in commands(path.read_text())]
    stages = [words for words in found if words[0] == "train" and "--config=configs/sct_spatial.py" in words]
    assert len(stages) >= 2
    assert {words[0] for words in found} == {"train", "ingest", "speed"}
    # A command must be given its configuration; what stands in a script for the user's words has none.
    whole = [w for w in found if w[0] == "ingest" or any(re.match("--config=.", x) for x in w)]
    assert len(whole) >= 8
    assert errors(whole) == {}


@pytest.mark.parametrize(
    "wrong", ["--config.data.shop=x", "--no_such_flag=1", "--config.train.batch_size=many", "word"]
)
def test_a_wrong_command_would_be_found(wrong):
    assert len(errors([["train", "--config=configs/sct_sc.py", wrong]])) == 1


def fakes(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which programs of a cluster are small scripts."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


SAVED, MEASURED = "mkdir -p run/checkpoints/5", "mkdir -p run/base/model run/other/model"


def task(status: int) -> str:
    """What srun says of a task."""
    return f"echo 'srun: error: node2: task 3: Exited with exit code {status}' >&2"


@pytest.mark.parametrize(
    ("happens", "restarts", "status", "again", "sentence"),
    [
        ("mkdir -p run/model", 0, 0, False, "nothing is left to do"),
        (SAVED, 0, 0, False, "nothing is left to do"),  # at train.stop_at, where no model is exported
        (MEASURED, 0, 0, False, "nothing is left to do"),  # a sweep
        (f"{SAVED}; exit 75", 0, 0, True, "back into the queue"),  # the time was over, and the run saved
        (f"{SAVED}; mkdir run/model; exit 75", 0, 0, True, "back into the queue"),  # an older model is no end
        (f"{SAVED}; exit 75", 19, 0, True, "back into the queue"),
        (f"{SAVED}; exit 75", 20, 75, False, "after 20 restarts"),
        ("exit 75", 0, 0, True, "back into the queue"),  # a process was lost before the first checkpoint
        (f"{MEASURED}; exit 75", 0, 0, True, "back into the queue"),  # ... or in a sweep
        ("echo 'srun: error: Node failure on node2' >&2; exit 1", 0, 0, True, "back into the queue"),
        ("exit 143", 0, 0, True, "back into the queue"),  # stopped while it compiled
        (f"{SAVED}; exit 137", 0, 0, True, "back into the queue"),
        ("exit 134", 20, 134, False, "after 20 restarts"),
        ("mkdir -p run; exit 1", 0, 1, False, "does not mend"),  # a mistake in the command
        (f"{SAVED}; exit 1", 0, 1, False, "does not mend"),  # ... when it goes on, or a diverged loss
        (f"{MEASURED}; exit 1", 0, 1, False, "does not mend"),  # a run of a sweep failed
        # One task finds a mistake: the others lose it, or are killed.
        (f"{SAVED}; {task(1)}; {task(75)}; exit 75", 0, 1, False, "does not mend"),
        (f"{task(75)}; exit 75", 0, 0, True, "back into the queue"),
        (f"{SAVED}; {task(1)}; exit 137", 0, 1, False, "does not mend"),
        ("exit 2", 0, 2, False, "does not mend"),  # a wrong flag
        (f"{task(2)}; {task(75)}; exit 75", 0, 1, False, "does not mend"),
        ("exit 3", 0, 3, False, "ended with status 3"),
        (f"{SAVED}; exit 130", 0, 130, False, "stopped by SIGINT"),
        ("exit 253", 0, 253, False, "memory is used up"),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_where_the_same_command_goes_on(
    tmp_path, happens, restarts, status, again, sentence
):
    srun = f'echo "$@" > said; env > seen; echo out; echo err >&2; {happens}'
    env = fakes(tmp_path, srun=srun, scontrol='echo "$@" > requeued')
    env |= {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts), "https_proxy": "http://proxy"}
    words = ["--config=configs/sct_sc.py", "--workdir=run", "--config.data.store=a store"]
    done = subprocess.run(
        [SLURM / "train.sh", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    told = [line for line in (done.stdout + done.stderr).splitlines() if sentence in line]
    assert len(told) == 1, done.stdout + done.stderr
    # What the tasks write comes out where they wrote it.
    assert done.stdout.splitlines()[0] == "out"
    assert done.stderr.splitlines()[0] == "err"
    said = (tmp_path / "said").read_text()
    assert (
        "-m launch.train --multihost --config=configs/sct_sc.py --workdir=run --config.data.store=a store"
        in said
    )
    assert "https_proxy" not in (tmp_path / "seen").read_text()
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text().split() == ["requeue", "77"]


def test_a_slurm_job_needs_a_run_folder(tmp_path):
    done = subprocess.run(
        [SLURM / "train.sh", "--config=configs/sct_sc.py"],
        env=fakes(tmp_path, srun="touch started"), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--workdir=FOLDER is missing" in done.stderr
    assert not (tmp_path / "started").exists()


def test_a_pod_gets_the_words_as_they_were_given_on_every_worker(tmp_path):
    (tmp_path / "home" / "sct").mkdir(parents=True)
    gcloud = """
        echo "$@" >> "$HERE/asked"
        for word; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
        cd "$HERE/home" && bash -c "$command"
    """
    env = fakes(tmp_path, gcloud=gcloud, trainer='printf "%s|" "$@"')
    env |= {"TPU": "pod", "ZONE": "zone", "HERE": str(tmp_path), "PYTHON": "trainer"}
    words = ["--config=configs/sct_sc.py", "--config.data.store=data/a store's"]
    subprocess.run([TPU / "train.sh", "start", *words], cwd=tmp_path, env=env, check=True)
    asked = (tmp_path / "asked").read_text()
    assert "compute tpus tpu-vm ssh pod --zone=zone --worker=all" in asked
    assert int((tmp_path / "home" / "sct" / "train.pid").read_text()) > 0
    log = tmp_path / "home" / "sct" / "train.log"
    for _ in range(200):
        if log.exists() and log.read_text().endswith("store's|"):
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert log.read_text() == "|".join(["-m", "launch.train", "--multihost", *words]) + "|"
    assert subprocess.run([TPU / "train.sh"], cwd=tmp_path, env=env, check=False).returncode == 2
