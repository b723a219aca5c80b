"""Plant faults in a copy of cctool, one at a time, and see whether the tests that should notice them do.

python benchmarks/planted_faults.py CHECKOUT [CHECKOUT ...] [--only NAME ...] [--json FILE]

A fault is a piece of code and what takes its place, a line each. The piece is looked for in all of
src/cctool, and has to be there exactly once: so a fault is planted wherever the code has been moved to. Tests
are named by their function, and the one file that defines it is looked for, too.

A fault counts as caught if the tests that are named run and at least one fails; one that keeps them from
being collected counts as missed, and so does one whose tests are not there. All tests are run without any
fault first, and have to pass. Each run is a copy (fork) of one process that has imported torch and pytest but
nothing of cctool, which saves their start and leaves nothing of a fault behind. Exits with 1 where a fault is
missed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    # A file that is changed and changed back within a second would meet the compiled code of the other.
    "PYTHONDONTWRITEBYTECODE": "1",
}
THIRD_PARTIES = (
    "torch", "torchvision", "numpy", "scipy.fft", "scipy.stats", "pywt", "onnx", "onnxruntime", "pydantic",
    "pytest", "typer.testing", "rich.table", "openpyxl", "safetensors.torch", "lightning_fabric",
)  # fmt: skip
PASSED, FAILED = 0, 1
"""Exit statuses of pytest: all passed; tests ran, and some failed."""


@dataclass(frozen=True)
class Fault:
    """One change of the code.

    Attributes:
        name: what is wrong then.
        package: where the code belongs; for the table and `--only`.
        right: a piece of a line that is in the source exactly once.
        wrong: what takes its place.
        tests: names of the test functions of which at least one has to fail.
    """

    name: str
    package: str
    right: str
    wrong: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "zero columns are counted as rows",
        "analysis",
        "cols=_empty(matrix.any(0)),",
        "cols=_empty(matrix.any(1)),",
        ("test_convolution_at_every_granularity",),
    ),
    Fault(
        "channels are looked for in one filter",
        "analysis",
        "_empty(occupied.any(3).any(1))",
        "_empty(occupied.any(3)[:, 0])",
        (
            "test_convolution_at_every_granularity",
            "test_channels_of_a_grouped_convolution_belong_to_their_group",
        ),
    ),
    Fault(
        "a second mask replaces the first",
        "checkpoint",
        "present[name].logical_and_(mask",
        "present[name].copy_(mask",
        ("test_masking_again_keeps_both_masks",),
    ),
    Fault(
        "checksums are not compared",
        "checkpoint",
        "if digits != masked.hexdigest().encode():",
        "if len(digits) != len(masked.hexdigest().encode()):",
        ("test_any_flipped_bit_is_seen",),
    ),
    Fault(
        "digests leave the shape out",
        "checkpoint",
        'hashlib.sha256(f"{dtype}{list(tensor.shape)}".encode())',
        'hashlib.sha256(f"{dtype}{tensor.dim()}".encode())',
        ("test_the_digests_and_the_content_hash_are_what_it_says",),
    ),
    Fault(
        "escape characters reach the terminal",
        "cli",
        "(*range(9), *range(11, 32), *range(127, 160))",
        "(*range(9), *range(11, 27), *range(127, 160))",
        ("test_names_in_a_file_cannot_steer_the_terminal",),
    ),
    Fault(
        "infinities stay in JSON",
        "cli",
        "isinstance(value, float) and value - value != 0:",
        "isinstance(value, float) and value != value:",
        ("test_plain_is_strict_json",),
    ),
    Fault(
        "odd symbols have the wrong sign",
        "coding",
        "return torch.where(wide < 0, -2 * wide - 1, 2 * wide)",
        "return torch.where(wide < 0, -2 * wide + 1, 2 * wide)",
        ("test_numbering_is_a_bijection",),
    ),
    Fault(
        "codewords are a symbol too long",
        "coding",
        "torch.frexp((symbols - 1 + (1 << k))",
        "torch.frexp((symbols + (1 << k))",
        ("test_lengths_are_those_of_the_codewords",),
    ),
    Fault(
        "the best order forgets where it began",
        "coding",
        "return smallest + bits.index(min(bits))",
        "return bits.index(min(bits))",
        ("test_the_best_order",),
    ),
    Fault(
        "splits take images in the file's order",
        "data",
        "members = random.permutation(np.flatnonzero(array == label))",
        "members = np.flatnonzero(array == label)",
        ("test_splits_never_change",),
    ),
    Fault(
        "rotation shears",
        "data",
        "[cosine, -sine * height / width, zero]",
        "[cosine, sine * height / width, zero]",
        ("test_rotation_by_a_quarter_turn_moves_pixels_exactly",),
    ),
    Fault(
        "mirrored edges skip a pixel",
        "data",
        "torch.minimum(folded, 2 * size - 1 - folded)",
        "torch.minimum(folded, (2 * size - 2 - folded).abs())",
        ("test_crop_and_flip_equal_the_plain_loop",),
    ),
    Fault(
        "biases are cut off rather than rounded",
        "formats",
        "integers = np.round(bias.astype(np.float64) / products)",
        "integers = np.trunc(bias.astype(np.float64) / products)",
        ("test_a_convolution_gets_integers_that_stand_for_the_same",),
    ),
    Fault(
        "the smallest error is reported",
        "formats",
        "self.error = max(self.error, float((left - right).abs().max()))",
        "self.error = min(self.error, float((left - right).abs().max()))",
        ("test_an_error_of_a_thousandth_of_the_range_is_caught",),
    ),
    Fault(
        "convolutions cost no input channels",
        "graph",
        "return Cost(macs=_outputs(call) * math.prod(weight[1:]))",
        "return Cost(macs=_outputs(call) * math.prod(weight[2:]))",
        ("test_convolution",),
    ),
    Fault(
        "a linear layer counts one position",
        "graph",
        "return Cost(macs=_outputs(call) * call.input_shapes[0][-1])",
        "return Cost(macs=call.output_shapes[0][-1] * call.input_shapes[0][-1])",
        ("test_linear_counts_every_position",),
    ),
    Fault(
        "widths are rounded up",
        "models",
        "widths[index] = int(widths[index] * width)",
        "widths[index] = -int(-widths[index] * width // 1)",
        ("test_student_width",),
    ),
    Fault(
        "frontiers keep what is beaten",
        "operations",
        "better = np.concatenate([[True], best[1:] < best[:-1]])",
        "better = np.concatenate([[True], best[1:] <= best[:-1]])",
        ("test_no_assignment_of_the_frontier_is_beaten_by_any",),
    ),
    Fault(
        "the search for a ratio goes the wrong way",
        "operations",
        "low, found = middle, tried[-1]",
        "high, found = middle, tried[-1]",
        ("test_the_ratio_is_reached_and_hardly_exceeded",),
    ),
    Fault(
        "times of later steps are told the wrong way round",
        "operations",
        "return present * earlier.before / earlier.reached if progressive else present",
        "return present * earlier.reached / earlier.before if progressive else present",
        ("test_a_machine_that_slows_down_between_steps_moves_no_target",),
    ),
    Fault(
        "the kept share shrinks linearly",
        "options",
        "return float(1 - (1 - rate) ** done)",
        "return float(rate * done)",
        ("test_steps_reach_the_rate",),
    ),
    Fault(
        "a kilobyte is 1024 bytes",
        "options",
        '"kb": 1e3',
        '"kb": 1024.0',
        ("test_targets_are_read_in_all_their_units",),
    ),
    Fault(
        "rates lose a unit to rounding",
        "pruning",
        "return {number: size - math.floor(rate * size + FUZZ) for",
        "return {number: size - math.floor(rate * size) for",
        ("test_rate_survives_floating_point",),
    ),
    Fault(
        "standard scores of a sample",
        "pruning",
        "scores.std(correction=0)",
        "scores.std(correction=1)",
        ("test_each_normalisation_by_hand",),
    ),
    Fault(
        "lamp divides by what is smaller",
        "pruning",
        "behind = ordered.flip(0).cumsum(0).flip(0)",
        "behind = ordered.cumsum(0)",
        ("test_norms_distances_and_lamp_equal_numpy_and_scipy", "test_lamp_keeps_the_order_and_ends_at_one"),
    ),
    Fault(
        "patterns keep one less",
        "pruning",
        "order[:, :, : pattern.of - pattern.keep]",
        "order[:, :, : pattern.of - pattern.keep + 1]",
        ("test_n_of_m_along_the_input_dim",),
    ),
    Fault(
        "integers are rounded down",
        "quantization",
        "return torch.div(x, scale).round_().add_(zero)",
        "return torch.div(x, scale).floor_().add_(zero)",
        ("test_integers_and_values_are_those_of_the_onnx_operators", "test_halves_are_rounded_to_even"),
    ),
    Fault(
        "bits are packed highest first",
        "quantization",
        'np.packbits(digits.reshape(-1), bitorder="little")',
        'np.packbits(digits.reshape(-1), bitorder="big")',
        ("test_packing_is_one_long_little_endian_number",),
    ),
    Fault(
        "moving averages keep their bias",
        "quantization",
        "self._weight = self.momentum * self._weight + 1 - self.momentum",
        "self._weight = 1.0",
        ("test_moving_average_is_bias_corrected",),
    ),
    Fault(
        "the lowest integer has no gradient",
        "quantization",
        "inside = (n >= grid.low) & (n <= grid.high) if tracked(x) else None",
        "inside = (n > grid.low) & (n <= grid.high) if tracked(x) else None",
        (
            "test_the_gradient_is_one_where_the_nearest_integer_is_in_the_grid_and_zero_elsewhere",
            "test_the_ends_of_a_weights_own_range_have_a_gradient",
        ),
    ),
    Fault(
        "learnt rounding revives masked weights",
        "quantization",
        "return found if self.mask is None else found * self.mask",
        "return found",
        ("test_masked_weights_stay_zero_and_channels_without_a_scale_too",),
    ),
    Fault(
        "averages warm up slowly",
        "training",
        "(1 + self.steps) / (10 + self.steps)",
        "(1 + self.steps) / (11 + self.steps)",
        ("test_it_is_the_recursion_in_double_precision",),
    ),
    Fault(
        "milestones count an epoch late",
        "training",
        "bisect.bisect_right(options.milestones",
        "bisect.bisect_left(options.milestones",
        ("test_multistep_equals_torch",),
    ),
    Fault(
        "softened losses are scaled by T",
        "training",
        "return temperature**2 * divergence",
        "return temperature * divergence",
        ("test_distillation_loss_is_t_squared_times_kl",),
    ),
    Fault(
        "steps revive masked weights",
        "training",
        "place.parameter.masked_fill_(self._gone[place.name], 0)",
        "place.parameter.masked_fill_(self._gone[place.name].logical_not(), 0)",
        ("test_no_step_revives_a_masked_weight", "test_momentum_from_elsewhere_cannot_revive_them"),
    ),
    Fault(
        "batches of statistics all count alike",
        "training",
        "norm.momentum = len(images) / (used + len(images))",
        "norm.momentum = 0.1",
        ("test_statistics_are_the_average_over_batches",),
    ),
    Fault(
        "signed integers have one level too many",
        "transforms",
        "top = 2 ** (bits - 1) - 1",
        "top = 2 ** (bits - 1)",
        ("test_the_prequantizer_alone",),
    ),
    Fault(
        "dead zones widen the other way",
        "transforms",
        "z.abs().sub_(0.5 + ",
        "z.abs().sub_(0.5 - ",
        ("test_a_dead_zone_rounds_up_later",),
    ),
    Fault(
        "rates count half",
        "transforms",
        "return 1 + 2 / math.log(2) * torch.log1p(z.abs())",
        "return 1 + 1 / math.log(2) * torch.log1p(z.abs())",
        ("test_it_meets_the_code_of_order_1_and_is_never_above_it",),
    ),
    Fault(
        "the sine transform is shifted",
        "transforms",
        "np.sin(_phases(size, np.arange(1, size + 1)))",
        "np.sin(_phases(size, np.arange(size)))",
        ("test_equals_scipy_and_numpy",),
    ),
    Fault(
        "bfloat16 is not used",
        "base",
        'if str(precision) == "32":',
        'if str(precision) != "16":',
        ("test_bf16_trains_and_differs", "test_bf16_changes_the_loss_a_little"),
    ),
    Fault(
        "edited files are not read again",
        "base",
        'hashlib.sha256(str(path).encode() + b"\\0" + path.read_bytes())',
        "hashlib.sha256(str(path).encode())",
        ("test_an_edited_file_is_read_again",),
    ),
    Fault(
        "wrong usage is no error of its own",
        "base",
        "exit_status = 2",
        "exit_status = 1",
        ("test_wrong_options_are_exit_2",),
    ),
    Fault(
        "what refuses to be copied is not shared",
        "base",
        "return deepcopy(model, known | _refusing(model, known))",
        "return deepcopy(model, dict(known))",
        ("test_copies_share_what_refuses_to_be_copied",),
    ),
    Fault(
        "learnt steps decay as weights do",
        "operations",
        "for parameter in child.parameters()",
        "for parameter in list(child.parameters())[:0]",
        ("test_weight_decay_leaves_learnt_steps_alone",),
    ),
    Fault(
        "sums of an evaluation are on the CPU",
        "training",
        "torch.zeros(3, dtype=torch.float64, device=device)",
        "torch.zeros(3, dtype=torch.float64)",
        ("test_evaluate_on_cuda",),
    ),
    Fault(
        "side information of a stream is read by numpy on the device",
        "transforms",
        "tensor.detach().float().cpu().contiguous().numpy()",
        "tensor.detach().float().contiguous().numpy()",
        ("test_evaluate_through_streams_and_decode",),
    ),
    Fault(
        "a teacher's statistics are on the CPU",
        "operations",
        "torch.tensor(values, device=like.device, dtype=like.dtype)",
        "torch.tensor(values, dtype=like.dtype)",
        ("test_distill_from_a_teacher_of_other_images",),
    ),
    Fault(
        "images that are timed stay on the CPU",
        "analysis",
        "generator=generator).to(device, dtype)",
        "generator=generator).to(dtype)",
        ("test_compare_on_cuda",),
    ),
    Fault(
        "evidence stays on the device",
        "pruning",
        "(value / counts[key]).cpu() for key",
        "(value / counts[key]) for key",
        ("test_prune_on_cuda",),
    ),
    Fault(
        "weights of basis functions are drawn on the device",
        "transforms",
        "nn.init.normal_(torch.empty(parameter.shape, dtype=parameter.dtype), std=std)",
        "nn.init.normal_(torch.empty_like(parameter), std=std)",
        ("test_train_swapped_layers", "test_weights_drawn_on_the_device_are_seen"),
    ),
    Fault(
        "batches of rounding are drawn for another device",
        "quantization",
        "generator=generator).to(wanted.device)",
        "generator=generator, device=wanted.device)",
        ("test_on_a_gpu_outputs_get_closer_too",),
    ),
    Fault(
        "ranges of activations are read by numpy",
        "quantization",
        "negative, positive = self._counts.cpu()",
        "negative, positive = self._counts",
        ("test_ranges_on_cuda_are_the_cpus",),
    ),
    Fault(
        "the device's generator is not resumed",
        "training",
        'torch.cuda.set_rng_state(mine["cuda"], fabric.device)',
        "torch.cuda.get_rng_state(fabric.device)",
        ("test_resume_as_if_never_stopped",),
    ),
)


def source_of(tree: Path, piece: str) -> Path:
    """The only file of src/cctool that holds a piece of code.

    Raises:
        LookupError: if it is not there exactly once.
    """
    found: Counter[Path] = Counter()
    for path in sorted((tree / "src" / "cctool").rglob("*.py")):
        count = path.read_text(encoding="utf-8").count(piece)
        if count:
            found[path] = count
    if sum(found.values()) != 1:
        places = (
            ", ".join(f"{path.relative_to(tree)} ({count})" for path, count in found.items()) or "nowhere"
        )
        raise LookupError(f"{piece!r} has to be in the source once, and is in: {places}")
    return next(iter(found))


def tests_of(tree: Path, fault: Fault) -> list[str]:
    """The tests of a fault, as pytest names them.

    Raises:
        LookupError: if a test is not defined in exactly one file.
    """
    named = []
    for test in fault.tests:
        defining = re.compile(rf"^def {test}\(", re.MULTILINE)
        files = [
            path
            for path in sorted((tree / "tests").rglob("test_*.py"))
            if defining.search(path.read_text(encoding="utf-8"))
        ]
        if len(files) != 1:
            places = ", ".join(str(path.relative_to(tree)) for path in files) or "nowhere"
            raise LookupError(f"{test} has to be in tests once, and is in: {places}")
        named.append(f"{files[0].relative_to(tree)}::{test}")
    return named


def run_tests(tree: Path, tests: Sequence[str], log: Path) -> int:
    """Run tests of a tree in a copy of this process; give pytest's exit status."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 70
        try:
            for descriptor in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
            os.chdir(tree)
            os.environ["PYTHONPATH"] = str(tree / "src")
            sys.path.insert(0, str(tree / "src"))
            importlib.invalidate_caches()
            import pytest

            options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
            status = int(pytest.main([*options, *tests]))
            used = Path(sys.modules["cctool"].__file__ or "")
            if not used.is_relative_to(tree):
                print(f"the tests used {used}")
                status = 71
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def planted(tree: Path, fault: Fault, log: Path) -> dict[str, Any]:
    """Plant a fault, run its tests and take it out again; a row of the table."""
    started = time.perf_counter()
    row: dict[str, Any] = {"fault": fault.name, "package": fault.package}
    try:
        path, tests = source_of(tree, fault.right), tests_of(tree, fault)
    except LookupError as error:
        return {**row, "file": None, "caught": False, "why": str(error), "seconds": 0.0}
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
        status = run_tests(tree, tests, log)
    finally:
        path.write_text(text, encoding="utf-8")
    why = {PASSED: "its tests pass", FAILED: ""}.get(status, f"pytest ended with {status}")
    return {
        **row,
        "file": str(path.relative_to(tree)),
        "tests": tests,
        "caught": status == FAILED,
        "why": why,
        "seconds": round(time.perf_counter() - started, 1),
    }


def copied(checkout: Path, place: Path) -> Path:
    """A copy of what the tests need of a checkout."""
    place.mkdir()
    for name in ("src", "tests", "docs", "benchmarks"):
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(checkout / name, place / name)
    return place


def main() -> None:
    """Plant all faults, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="+")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults or packages, or patterns of these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write what the tests print here")
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    sys.dont_write_bytecode = True
    patterns = arguments.only or ["*"]
    faults = [
        fault
        for fault in FAULTS
        if any(
            fnmatch.fnmatchcase(name, pattern) for name in (fault.name, fault.package) for pattern in patterns
        )
    ]
    if not faults:
        sys.exit("--only: there is no such fault")
    for name in THIRD_PARTIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    found = {tree: of_checkout(tree.resolve(), faults, arguments.log) for tree in arguments.checkout}
    if arguments.json is not None:
        from parity import commit_of
        from record import described

        rows = [
            {"benchmark": "planted_faults", "checkout": commit_of(tree), **row}
            for tree, several in found.items()
            for row in several
        ]
        record = described("python benchmarks/planted_faults.py BEFORE AFTER", 0, rows)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if any(not row["caught"] for rows in found.values() for row in rows) else 0)


def of_checkout(checkout: Path, faults: Sequence[Fault], log: Path | None) -> list[dict[str, Any]]:
    """Plant faults in a copy of a checkout, each by itself; print a line each and give the rows."""
    print(checkout)
    with tempfile.TemporaryDirectory(prefix="planted-") as temporary:
        tree = copied(checkout, Path(temporary).resolve() / "tree")
        log = (log or Path(temporary) / "log.txt").resolve()
        rows = []
        tests: list[str] = []
        for fault in faults:
            with contextlib.suppress(LookupError):
                tests += tests_of(tree, fault)
        if status := run_tests(tree, sorted(set(tests)), log):
            print(log.read_text(encoding="utf-8")[-2000:])
            sys.exit(f"the tests do not pass without a fault either: pytest ended with {status}")
        for fault in faults:
            row = planted(tree, fault, log)
            rows.append(row)
            verdict = "caught" if row["caught"] else "MISSED"
            print(
                f"{verdict}  {fault.package:<13} {fault.name:<48} {row['seconds']:>5.1f} s  {row['why']}",
                flush=True,
            )
    missed = sum(not row["caught"] for row in rows)
    print(f"{len(rows)} faults, {missed} missed; {sum(row['seconds'] for row in rows):.0f} s")
    return rows


if __name__ == "__main__":
    main()
