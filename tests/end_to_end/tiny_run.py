"""Whole runs of `train.py` on real codes, small enough to be run, killed and broken by tests.

`Place.program` starts the command as a user does. `Place.start` forks it from a server that has
done the imports already: the same `train.py` with the same arguments, ten seconds sooner.
"""

import csv
import json
import lzma
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mediphi.tracking.names import METRICS, SEARCH_METRICS

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "train.py"
TINY = ROOT / "assets" / "models" / "tiny"
ICD = ROOT / "assets" / "corpora" / "icd10cm_2021"
PRELOAD = [
    "mediphi.training",
    "mediphi.searching",
    "mediphi.tracking.tensorboard_log",
    "matplotlib.backends.backend_svg",
]
PRELOAD += ["transformers.models.phi3.modeling_phi3", "deepspeed"]  # looked for when saving
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CLOCK = {metric.name for metric in (*METRICS, *SEARCH_METRICS) if metric.wall_clock}
STEPS = 24
"""Optimizer steps of each phase."""

SMALL = [
    "logger=csv",
    "logger.every_steps=2",
    "hardware.micro_batch=2",
    "hardware.num_threads=1",
    "hardware.checkpoints.every_steps=3",
    "corpus.heldout_fraction=0.1",
    "stage.max_length=128",
    "stage.global_batch=4",
    "stage.eval_every_steps=10",
    "stage.eval_max_rows=4",
]
CODES = ["corpus=medcode", "corpus.sources.icd10cm.max_documents=40"]
PIT = ["stage=pit", *CODES, *SMALL, "stage.quiz.num_questions=20"]
PIT += [
    f"stage.{phase}.{key}={value}"
    for phase in ("phase1", "phase2")
    for key, value in (("max_steps", STEPS), ("epochs", 30), ("warmup_steps", 2))
]
DAPT = ["stage=dapt", *SMALL, "stage.phase.max_steps=8", "stage.phase.warmup_steps=2"]
DAPT += ["stage.phase.epochs=30"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Child:
    """A command that runs; `process` has `pid`, and `exitcode` or `returncode`."""

    process: Any
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process.is_alive()

    def wait(self, seconds: float = 200) -> Ended:
        """Its end; what runs longer is killed, so that nothing is left behind."""
        if isinstance(self.process, subprocess.Popen):
            try:
                code = self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                code = self.process.wait()
        else:
            self.process.join(seconds)
            self.process.kill()
            self.process.join()
            code = self.process.exitcode
        return Ended(code, self.out.read_text(), self.err.read_text())

    def send(self, number: int) -> None:
        if self.alive():
            os.kill(self.pid, number)

    def kill(self) -> Ended:
        self.send(signal.SIGKILL)
        return self.wait()


@dataclass
class Place:
    """Where commands run and write: `runs`, `cache` and a working directory.

    `assets` holds what all places share: a model folder `model` and a folder of codes `codes`.
    `starter` stands before `train.py`: Python, or torchrun.
    """

    folder: Path
    cache: Path
    assets: Path
    environment: dict[str, str] = field(default_factory=dict)
    starter: list[str] = field(default_factory=lambda: [sys.executable])
    _count: int = 0

    @property
    def runs(self) -> Path:
        return self.folder / "my runs"

    @property
    def cwd(self) -> Path:
        return self.folder / "work"

    def start(self, *arguments: str, limit: Callable[[], None] | None = None) -> Child:
        """`python train.py <arguments>` in a forked child; `limit` runs in it first."""
        files = self._files()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # the server reads it once, when it starts
        process = context.Process(
            target=_become, args=(self._arguments(arguments), self._env(), self.cwd, files, limit)
        )
        process.start()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        return Child(process, *files)

    def program(self, *arguments: str, cwd: Path | None = None, **environment: str) -> Child:
        """The same in a process of its own, from scratch."""
        out, err = self._files()
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [*self.starter, str(TRAIN), *self._arguments(arguments)],
                cwd=cwd or self.cwd,
                env=self._env() | environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        return Child(process, out, err)

    def run(self, *arguments: str, **how: Any) -> Ended:
        return self.start(*arguments, **how).wait()

    def run_dir(self, stage: str = "pit") -> Path:
        """The only run directory of a stage."""
        (path,) = [p for p in (self.runs / stage).iterdir() if p.is_dir()]
        return path

    def _files(self) -> tuple[Path, Path]:
        self._count += 1
        self.cwd.mkdir(parents=True, exist_ok=True)
        out, err = (self.folder / f"{self._count:03d}.{name}" for name in ("out", "err"))
        for path in (out, err):
            path.touch()  # a child may be killed before it opens them
        return out, err

    def _arguments(self, arguments: tuple[str, ...]) -> list[str]:
        chosen = [argument.partition("=")[0] for argument in arguments]
        ours = []
        if "model.path" not in chosen:
            ours.append(f"model.architecture={self.assets / 'model'}")
        if "corpus=medcode" in arguments:
            ours.append(f"corpus.sources.icd10cm.path={self.assets / 'codes'}")
        return [*arguments, *ours]

    def _env(self) -> dict[str, str]:
        ours = ("MEDIPHI_", "HYDRA_", "WANDB_", "COVERAGE_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        kept |= {"MEDIPHI_RUNS": str(self.runs), "MEDIPHI_CACHE": str(self.cache)}
        kept |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        return kept | self.environment


def _become(
    arguments: list[str],
    environment: dict[str, str],
    cwd: Path,
    files: tuple[Path, Path],
    limit: Callable[[], None] | None,
) -> None:
    """Turn this process, forked from the server, into `python train.py <arguments>`."""
    for number, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    sys.argv = [str(TRAIN), *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if limit is not None:
        limit()
    runpy.run_path(str(TRAIN), run_name="__main__")


def write_model(folder: Path) -> Path:
    """The tiny model's architecture, shrunk until imports cost more than training."""
    folder.mkdir(parents=True)
    for path in TINY.iterdir():
        shutil.copyfile(path, folder / path.name)
    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    for name in ("short_factor", "long_factor"):  # half a head's dimension: 8
        config["rope_scaling"][name] = config["rope_scaling"][name][:8]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_codes(folder: Path) -> Path:
    """The first chapter of ICD-10-CM, as published: reading all of it takes longer than a run."""
    folder.mkdir(parents=True)
    order = lzma.decompress((ICD / "icd10cm-order-Jan-2021.txt.xz").read_bytes()).decode()
    lines = [line for line in order.splitlines(keepends=True) if line[6] in "AB"]
    (folder / "icd10cm-order-Jan-2021.txt").write_text("".join(lines))
    tabular = lzma.decompress((ICD / "icd10cm_tabular_2021.xml.xz").read_bytes())
    head, end, _ = tabular.partition(b"</chapter>")
    root = tabular.rstrip().rpartition(b"</")[2]
    (folder / "icd10cm_tabular_2021.xml").write_bytes(head + end + b"</" + root)
    return folder


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def curve(run_dir: Path) -> list[tuple[str, ...]]:
    """Rows of metrics.csv without the columns that depend on the clock."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [tuple(v for k, v in row.items() if k not in CLOCK) for row in rows]


def checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoint folders, phases in order, oldest first."""
    return sorted(run_dir.glob("checkpoints/*/step-*"))


def wait_for(condition: Callable[[], object], child: Child, seconds: float = 120) -> bool:
    """Whether `condition` came true while the child ran."""
    end = time.monotonic() + seconds
    while child.alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return bool(condition())


def files_in(folder: Path) -> dict[str, bytes]:
    """Content of every file below, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(ended: Ended) -> str:
    """The error line of a command that ended in one, and in nothing else that alarms."""
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended
    assert ended.err.rstrip().endswith(errors[0]), ended
    assert "Traceback" not in ended.err + ended.out, ended
    return errors[0]
