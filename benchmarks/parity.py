"""Run one list of commands with two checkouts of cctool, and compare all that they print and write.

python benchmarks/parity.py BEFORE AFTER                      all commands of parity_plan.py
python benchmarks/parity.py BEFORE AFTER --only 'train *'     some; what they need has to be among them

One environment (that of this Python), one thread. Each checkout gets an empty working folder of the same
name; its commands run there one after the other. Most run in a copy (fork) of one process that has imported
the checkout's cctool, some as `python -m cctool` and one as a shell pipeline. What is compared, and what is
left out because it is measured time, stands in parity_compare.py. Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib
import json
import os
import pkgutil
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity_plan import FILES, PLAN, Planned

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "COLUMNS": "100",
    "PYTHONDONTWRITEBYTECODE": "1",
}
THIRD_PARTIES = (
    "torch", "torch.export", "torch.onnx", "torchvision", "onnx", "onnxruntime", "onnxscript", "pydantic",
    "pywt", "scipy.fft", "scipy.stats", "scipy.optimize", "matplotlib.pyplot", "rich.table", "openpyxl",
    "thop", "safetensors.torch", "lightning_fabric", "torch._dynamo", "torch.onnx._internal.exporter._core",
)  # fmt: skip
"""Imported once by a worker, before it copies itself for each command."""


# -- the worker: runs the list in the working folder that it is started in ------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies in a folder, with what changes when a file is written again."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def import_everything() -> None:
    """Import what commands need, so that copies of this process need not."""
    for name in THIRD_PARTIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import cctool

    for module in pkgutil.walk_packages(cctool.__path__, "cctool."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def in_copy(arguments: Sequence[str], out: Path, err: Path) -> tuple[int, float]:
    """Run a command in a copy of this process; give its exit status and seconds of CPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        status = 70
        try:
            for path, descriptor in ((out, 1), (err, 2)):
                opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(opened, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["cctool", *arguments]
            from cctool.cli.main import main

            try:
                main()
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, code, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(code), usage.ru_utime + usage.ru_stime


def in_process(planned: Planned, out: Path, err: Path) -> tuple[int, float]:
    """Run a command, or a pipeline, in processes of its own."""
    program = f"{sys.executable} -m cctool"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with out.open("wb") as stdout, err.open("wb") as stderr:
        line = f'set -eo pipefail; cctool() {{ {program} "$@"; }}; {planned.line}' if planned.shell else ""
        status = subprocess.run(
            ["bash", "-c", line] if planned.shell else [*program.split(), *planned.line.split()],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            check=False,
        ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return status, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def work(said: Path, names: Sequence[str]) -> None:
    """Run the commands of these names here, and write down what came of each.

    Args:
        said: folder for what the commands print, and for `done.json`.
        names: of commands, in the order of the plan.
    """
    import_everything()
    here = Path.cwd()
    for name, text in FILES.items():
        (here / name).write_text(text.lstrip("\n"), encoding="utf-8")
    done = []
    before = snapshot(here)
    for planned in PLAN:
        if planned.name not in names:
            continue
        stem = planned.name.replace(" ", "_")
        out, err = said / f"{stem}.out", said / f"{stem}.err"
        started = time.perf_counter()
        if planned.process or planned.shell:
            status, cpu = in_process(planned, out, err)
        else:
            status, cpu = in_copy(planned.line.split(), out, err)
        after = snapshot(here)
        written = [name for name, stat in after.items() if before.get(name) != stat]
        done.append(
            {
                "name": planned.name,
                "status": status,
                "cpu": round(cpu, 2),
                "wall": round(time.perf_counter() - started, 2),
                "written": written,
                "hashes": {
                    hashlib.sha256((here / name).read_bytes()).hexdigest(): name
                    for name in written
                    if name.endswith((".pt", ".safetensors"))
                },
                "removed": sorted(before.keys() - after.keys()),
            }
        )
        before = after
        print(f"{planned.name}: {status}, {done[-1]['wall']} s", file=sys.stderr, flush=True)
    (said / "done.json").write_text(json.dumps(done), encoding="utf-8")


# -- the parent -----------------------------------------------------------------------------------------


def run_checkout(checkout: Path, place: Path, names: Sequence[str], *, talk: bool) -> None:
    """Run the commands with one checkout, in `place/work`; what they print goes to `place/said`."""
    (place / "work").mkdir(parents=True)
    (place / "said").mkdir()
    source = checkout / "src"
    if not (source / "cctool").is_dir():
        sys.exit(f"{checkout} holds no src/cctool")
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(source)}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(place / "said"), *names]
    finished = subprocess.run(
        command,
        cwd=place / "work",
        env=environment,
        check=False,
        stderr=None if talk else subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    if finished.returncode:
        sys.exit(f"the commands with {checkout.name} did not run to their end\n{finished.stderr or ''}")


def commit_of(checkout: Path) -> str | None:
    """The short commit of a checkout; None where there is no git."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def source_hash(checkout: Path) -> str:
    """A hash of all source of a checkout, so that a record tells uncommitted code, too."""
    digest = hashlib.sha256()
    for path in sorted((checkout / "src").rglob("*.py")):
        digest.update(path.relative_to(checkout).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def chosen(patterns: Sequence[str] | None) -> list[str]:
    """Names of the plan that match; all without patterns."""
    names = [planned.name for planned in PLAN]
    if patterns is None:
        return names
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            sys.exit(f"--only {pattern}: there is no such command in the plan")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def print_rows(rows: Sequence[dict[str, Any]], shown: int) -> None:
    """Print a line a command, and the first differences behind those that differ."""
    width = max(len(row["name"]) for row in rows)
    print(f"{'command':<{width}}  verdict    files  before, s  after, s")
    for row in rows:
        verdict = "differs" if row["differences"] else "equal"
        times = f"{row['before']:>9.2f}  {row['after']:>8.2f}"
        print(f"{row['name']:<{width}}  {verdict:<9}  {row['files']:>5}  {times}")
        for difference in row["differences"][:shown]:
            print(f"    {difference}")
        if len(row["differences"]) > shown:
            print(f"    and {len(row['differences']) - shown} more")


def write_record(target: Path, arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Write the result as the other benchmarks write theirs."""
    from record import described

    both = {"before": arguments.before, "after": arguments.after}
    kept = [
        {
            "benchmark": "parity",
            **{side: {"commit": commit_of(path), "source": source_hash(path)} for side, path in both.items()},
            "commands": len(rows),
            "files": sum(row["files"] for row in rows),
            "differing": sum(bool(row["differences"]) for row in rows),
            "seconds": {side: round(sum(row[side] for row in rows), 1) for side in both},
            "allowed_options": sorted(arguments.allow_option),
            "each": [
                {
                    "command": row["name"],
                    "files": row["files"],
                    **{side: row[side] for side in both},
                    "differences": row["differences"][: arguments.shown],
                }
                for row in rows
            ],
        }
    ]
    # torch says how many threads it has; the commands had one.
    os.environ.update(ENVIRONMENT)
    record = described("python benchmarks/parity.py BEFORE AFTER", 0, kept)
    record["machine"]["threads"] = 1
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run both lists, compare, print a table."""
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another checkout")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of commands, or patterns of names")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder to keep what was written in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument(
        "--allow-option",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of a history's options that may differ, or be there on one side; may be repeated",
    )
    parser.add_argument("--shown", type=int, default=5, help="differences to name of a command")
    parser.add_argument("--quiet", action="store_true", help="say nothing while commands run")
    arguments = parser.parse_args()
    names = chosen(arguments.only)

    from parity_compare import Comparison

    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        if arguments.keep is not None and arguments.keep.exists():
            sys.exit(f"--keep {arguments.keep}: it exists")
        root = Path(temporary) if arguments.keep is None else arguments.keep.resolve()
        sides = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
        for side, checkout in sides.items():
            run_checkout(checkout, root / side, names, talk=not arguments.quiet)
        comparison = Comparison(
            root / "before", root / "after", tuple(sides.values()), frozenset(arguments.allow_option)
        )
        rows = comparison.rows({planned.name: asdict(planned) for planned in PLAN})
    print_rows(rows, arguments.shown)
    bad = sum(bool(row["differences"]) for row in rows)
    files = sum(row["files"] for row in rows)
    times = " and ".join(f"{sum(row[side] for row in rows):.0f}" for side in sides)
    print(f"{len(rows)} commands, {files} files, {bad} commands differ; {times} seconds of CPU")
    if arguments.json is not None:
        write_record(arguments.json, arguments, rows)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
