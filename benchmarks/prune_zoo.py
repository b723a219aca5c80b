"""Half the units of every family of each network, by cctool and by Torch-Pruning: who can, exactly, how fast.

    python benchmarks/prune_zoo.py [--models GLOB] [--limit-gb 8] [--timeout 900] [--tools cctool,exact,...]

Each tool handles each network in a process of its own, which is ended where it takes more memory or time than
the limits; seconds, those of the time limit too, are the CPU's, on one thread. Rows of networks that ran
before stay in the result, so that a run may be done in pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

import record
import zoo_oracle
import zoo_sets
from cctool.models.registry import build
from cctool.options.prune.choices import PruneMethod, Scope
from cctool.options.prune.options import PruneOptions

SEED = 0
OURS = ("cctool.operations.registries", "cctool.pruning.cut.planner", "prune_table")
RESULTS = Path(__file__).parent / "results"


def torchvision_names() -> list[str]:
    from torchvision import models

    def size(name: str) -> int:
        return int(models.get_model_weights(name).DEFAULT.meta["num_params"])

    return [f"torchvision:{name}" for name in sorted(models.list_models(module=models), key=size)]


SETS: dict[str, Callable[[], list[str]]] = {
    "torchvision": torchvision_names,
    "segmentation": zoo_sets.segmentation_names,
    "timm": zoo_sets.timm_names,
}
"""The sets of networks, by name."""


def arguments_of(name: str) -> dict[str, Any]:
    """Arguments of the builder: auxiliary heads on where there are any."""
    heads = (
        {"aux_logits": True, "init_weights": False} if name.endswith(("googlenet", "inception_v3")) else {}
    )
    return {**heads, **zoo_sets.segmentation_arguments(name)}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """The randomised network, the same at each call, and one input."""
    torch.manual_seed(SEED)
    model = build(name, arguments_of(name)).eval()
    zoo_oracle.randomise(model)
    generator = torch.Generator().manual_seed(SEED)
    return model, torch.randn(1, *zoo_sets.shape_of(name, arguments_of(name)), generator=generator)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that give the logits, auxiliary ones included."""
    widths = [(m, getattr(m, "out_features", getattr(m, "out_channels", None))) for m in model.modules()]
    last = [module for module, width in widths if width == 1000 and hasattr(module, "weight")][-1:]
    return last or [module for module, width in widths if width == zoo_sets.SEGMENTED_CLASSES]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- cctool -----------------------------------------------------------------------------------------------
def by_cctool(name: str, exact: bool = False) -> dict[str, Any]:
    """Cut, and check all that one would do with the result."""
    from cctool.pruning.cut import planner as prune

    model, x = network(name)
    options = PruneOptions(method=PruneMethod.L2, rate=0.5, scope=Scope.LOCAL, exact=exact)
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    before, verifying, original = count(model), [0.0], prune.check

    def timed(*args: Any) -> Any:
        start = time.process_time()
        try:
            return original(*args)
        finally:
            verifying[0] += time.process_time() - start

    prune.check = timed
    start = time.process_time()
    result = prune.thin(model, (x,), options)
    seconds = time.process_time() - start
    peak = peak_bytes()
    report = result.report
    row: dict[str, Any] = {
        "parameters": before,
        "parameters_after": count(model),
        "seconds": round(seconds - verifying[0], 3),
        "seconds_verified": round(seconds, 3),
        "dense_bytes": dense,
        "peak_bytes": peak,
        "error": report.error,
        "precision": report.precision,
        "statistics": len(report.statistics),
        "notes": list(report.notes),
        "frozen": sorted({f"{f.op}: {f.reason}" for f in report.frozen if f.op not in ("input", "output")}),
    }
    if exact:
        return row
    dense_network, _ = network(name)
    row["removable"] = removable_fraction(dense_network, result.graph)
    expected = shapes(dense_network, x)
    row["oracle_error"] = oracle_error(dense_network, model, x)
    del dense_network
    row |= after_the_cut(name, model, expected, x, result.plan)
    smaller = prune.thin(model, (x,), options).report
    row["second_parameters"] = smaller.parameters_after
    return row


def removable_fraction(model: nn.Module, graph: Any) -> float:
    from prune_table import removable

    return round(removable(model, graph) / count(model), 6)


def shapes(model: nn.Module, x: Tensor) -> list[list[int]]:
    """Shapes of all tensors of a network's output."""
    with torch.no_grad():
        return [list(value.shape) for value in zoo_sets.tensors_of(model(x))]


def after_the_cut(
    name: str, model: nn.Module, expected: list[list[int]], x: Tensor, plan: Any
) -> dict[str, Any]:
    """Forward, backward and the way through a file."""
    from cctool import load, save
    from cctool.checkpoint.checkpoint import Checkpoint
    from cctool.checkpoint.edits.thin import thinned
    from cctool.checkpoint.spec import ModelSpec

    with torch.no_grad():
        logits = list(zoo_sets.tensors_of(model(x)))
    spec = ModelSpec(architecture=name, arguments=arguments_of(name), input_shape=tuple(x.shape[1:]))
    attributes = [(module, key) for module, values in plan.attributes.items() for key in values]
    spec = thinned(spec, model, plan.tensors, attributes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.pt"
        save(Checkpoint(model, spec), path)
        loaded = load(path).model.eval()
        with torch.no_grad():
            again = list(zoo_sets.tensors_of(loaded(x)))
        same = all(bool(torch.equal(a, b)) for a, b in zip(again, logits, strict=True))
        del loaded
    gc.collect()
    loss = model.train()(torch.cat([x, x.flip(-1)]))
    sum(value.square().mean() for value in zoo_sets.tensors_of(loss)).backward()
    gradients = all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    trained = sum(p.grad is not None for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()
    return {
        "forward": [list(value.shape) for value in logits] == expected,
        "backward": gradients and trained == len(list(model.parameters())),
        "round_trip": same,
    }


def oracle_error(dense: nn.Module, cut: nn.Module, x: Tensor) -> float:
    """Largest difference between cut and masked over the largest output; in float64 where it is not small."""
    handles = zoo_oracle.mask(dense, cut)
    batch = torch.cat([x, x.flip(-1), x.roll(7, -2)])

    def difference(inputs: Tensor) -> float:
        with torch.no_grad():
            pairs = zip(zoo_sets.tensors_of(dense(inputs)), zoo_sets.tensors_of(cut(inputs)), strict=True)
        return max(float((expected - found).abs().max() / expected.abs().max()) for expected, found in pairs)

    error = difference(batch)
    if error > 1e-5 and count(dense) < 4e8:
        state = cut.state_dict()
        dense.double(), cut.double()
        error = difference(batch.double())
        cut.float().load_state_dict(state)
    for handle in handles:
        handle.remove()
    return error


# ---- Torch-Pruning ----------------------------------------------------------------------------------------
def by_torch_pruning(name: str) -> dict[str, Any]:
    """The same with default settings, the output layer ignored."""
    import torch_pruning as tp

    from prune_table import removable_by_torch_pruning

    model, x = network(name)
    before = count(model)
    start = time.process_time()
    tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=output_layers(model),
    ).step()
    seconds = time.process_time() - start
    row: dict[str, Any] = {
        "parameters": before,
        "parameters_after": count(model),
        "seconds": round(seconds, 3),
        "peak_bytes": peak_bytes(),
    }
    fresh, x = network(name)
    row["forward"] = shapes(model, x) == shapes(fresh, x)
    del model
    try:
        theirs, _ = removable_by_torch_pruning(fresh, x, output_layers(fresh))
        row["removable"] = round(theirs / before, 6)
    except Exception as error:  # whatever it raises is a result
        row["removable_error"] = one_line(error)
    return row


TOOLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "cctool": by_cctool,
    "exact": lambda name: by_cctool(name, exact=True),
    "torch_pruning": by_torch_pruning,
}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def warm_up(tool: str) -> None:
    """Import what is imported at the first use, so that it is not timed."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(1, 3, 8, 8)
    if tool == "torch_pruning":
        import torch_pruning as tp

        importance = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model[1]]).step()
    else:
        from cctool.pruning.cut.planner import thin

        thin(model, (x,), PruneOptions(method=PruneMethod.L2, rate=0.5, scope=Scope.LOCAL))


def child(tool: str, name: str, output: IO[str]) -> None:
    """Run one tool on one network and write what came of it as JSON."""
    warm_up(tool)
    warnings.simplefilter("ignore")
    try:
        row = {"status": "ok", **TOOLS[tool](name)}
    except Exception as error:  # whatever it raises is a result
        row = {"status": one_line(error)}
    output.write(json.dumps(row))
    output.flush()


def watched(tool: str, name: str, limit_gb: float, timeout: float) -> dict[str, Any]:
    """Run one tool on one network in a process of its own, within the limits.

    It is forked, so that torch is imported once: this process computes nothing, and has no threads.
    """
    import psutil

    with tempfile.TemporaryFile("w+") as output:
        process = os.fork()
        if not process:
            child(tool, name, output)
            os._exit(0)
        used, peak, status = 0.0, 0, ""
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            with contextlib.suppress(psutil.Error):  # it may end just now
                child_process = psutil.Process(process)
                peak = max(peak, child_process.memory_info().rss)
                times = child_process.cpu_times()
                used = times.user + times.system
            if peak > limit_gb * 2**30:
                status = f"out of memory at {limit_gb:g} GB"
            elif used > timeout:
                status = f"out of time at {timeout:g} s"
            if status:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                break
            time.sleep(0.05)
        output.seek(0)
        text = output.read()
    if status or not text:
        return {"status": status or "ended without a result", "peak_bytes": peak}
    found: dict[str, Any] = json.loads(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=SETS, default="torchvision")
    parser.add_argument("--models", default="*")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--limit-gb", type=float, default=8)
    parser.add_argument("--timeout", type=float, default=900, help="CPU seconds")
    parser.add_argument("--missing", action="store_true", help="only what is not in the result yet")
    parser.add_argument("--merge", help="take the rows of another result in, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for module in ("torch_pruning", "scipy.sparse.csgraph", "torch._meta_registrations", *OURS):
        importlib.import_module(module)
    target = "prune_zoo" if options.set == "torchvision" else f"prune_zoo_{options.set}"
    command = (
        f"python benchmarks/prune_zoo.py --set {options.set} --limit-gb {options.limit_gb:g} "
        f"--timeout {options.timeout:g}"
    )
    if options.merge:
        merged = {row["network"]: row for row in read(target)}
        for row in json.loads(Path(options.merge).read_text(encoding="utf-8"))["rows"]:
            merged[row["network"]] = merged.get(row["network"], {}) | row
        record.write(target, command, SEED, sorted(merged.values(), key=lambda r: str(r["network"])))
        return
    names = [
        name for name in SETS[options.set]() if fnmatch.fnmatchcase(name.partition(":")[2], options.models)
    ]
    for tool in options.tools.split(","):
        for name in names:
            rows = {row["network"]: row for row in read(target)}
            row = rows.setdefault(name, {"network": name, "set": options.set})
            if options.missing and tool in row:
                continue
            if tool == "exact" and not row.get("cctool", {}).get("statistics"):
                continue
            row[tool] = watched(tool, name, options.limit_gb, options.timeout)
            print(name, tool, json.dumps(row[tool]), file=sys.stderr, flush=True)
            record.write(target, command, SEED, sorted(rows.values(), key=lambda r: str(r["network"])))


def read(target: str) -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    path = RESULTS / f"{target}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.is_file() else []


if __name__ == "__main__":
    main()
