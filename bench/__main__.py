"""`python -m bench FAMILY...|all`, `python -m bench plot`, `python -m bench tests|sanitize [FAMILY...]`: see README.md."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dsv3.ops  # noqa: F401  (registers the ops)
from bench.cases import Case, Timing, families, load
from bench.check import check_case, require_native
from bench.results import RESULTS, Environment, csrc_sha, environment, gpu_folder, make_row, write_rows
from bench.table import print_table
from bench.timing import FULL, QUICK, Ceilings, Protocol, measure_case, measure_ceilings, one_line, release
from dsv3.ops import registry


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Times dsv3's ops beside their floor and peers."
    )
    parser.add_argument("what", nargs="+", help=f"{', '.join(families())}, all; plot; tests or sanitize [family...]")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few repeats; writes only with --out")
    parser.add_argument("--dry-run", action="store_true", help="any device: compare op and baselines at tiny sizes")
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results/<gpu>")
    parser.add_argument("--commit", help="commit to record where the tree is no git checkout")
    args = parser.parse_args(argv)
    known = {*families(), "all"}
    unknown = [] if args.what[0] in ("plot", "tests", "sanitize") else [name for name in args.what if name not in known]
    if unknown:
        parser.error(f"expected families among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    if args.what[0] == "plot" and args.what[1:]:
        parser.error(f"plot draws all that it finds in --out, got {', '.join(args.what[1:])}")
    if args.what[0] == "plot" and args.out is not None and not args.out.is_dir():
        parser.error(f"plot: {args.out} is no folder")
    if "all" in args.what:
        args.what = families()
    return args


class Failures:
    """Prints every failure where it happens, and remembers whether there was one; `stopped`: by Ctrl-C or SIGTERM."""

    def __init__(self, console: Console) -> None:
        self.console, self.lines, self.stopped = console, [], False

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.console.print(f"FAILED {line}", style="red", markup=False)


def dry_run(names: list[str], console: Console, failures: Failures) -> None:
    """Every case once at tiny sizes, where this runs: on the CPU unless there is a Hopper GPU."""
    device = torch.device("cuda" if has_hopper() else "cpu")
    for family in names:
        cases = load(family, tiny=True)
        for case in cases:
            try:
                check_case(case, device, compiled=True)
            except Exception as error:  # the others still run
                failures.add(f"{case.title}: {one_line(error)}")
        console.print(f"{family}: {len(cases)} cases on {device.type}")


def run_family(family: str, ceilings: Ceilings, protocol: Protocol, failures: Failures) -> list[tuple[Case, Timing]]:
    """The times of a family's cases, those that failed left out, and those that a signal kept from being measured."""
    measured = []
    device = torch.device("cuda", torch.cuda.current_device())
    for case, small in zip(load(family, tiny=False), load(family, tiny=True), strict=True):
        registry.FALLBACKS.clear()  # of the case before, whose model may have sizes without kernels
        try:
            if case.measure is None:  # others are too long to run twice
                check_case(small, device, compiled=False)
                require_native(case.op)
            timing = measure_case(case, ceilings, protocol)
            require_native(case.op)
        except Exception as error:  # the others still run
            failures.add(f"{case.title}: {one_line(error)}")
            release()
            continue
        except KeyboardInterrupt:
            failures.stopped = True
            failures.add(f"{case.title}: stopped, as {len(measured)} cases of {family} were measured")
            break
        for line in timing.errors:
            failures.add(f"{case.title}: {line}")
        measured.append((case, timing))
    return measured


def folder(args: argparse.Namespace, env: Environment, names: list[str]) -> Path:
    """Where results of these families go: comm has a rank on each of several GPUs, no other uses more than one."""
    return args.out or RESULTS / gpu_folder(env.gpu, torch.cuda.device_count() if names == ["comm"] else 1)


def run_benchmarks(args: argparse.Namespace, env: Environment, console: Console, failures: Failures) -> None:
    """Ceilings, then the families one after the other; writes each family's file as soon as it is measured."""
    protocol = QUICK if args.quick else FULL
    ceilings, top = measure_ceilings(protocol)

    def rows(measured: list[tuple[Case, Timing]], sha: str) -> list[dict[str, Any]]:
        return [make_row(case, timing, ceilings=ceilings, env=env, sha=sha) for case, timing in measured]

    print_table(console, "ceilings", rows(top, ""))
    for family in args.what:
        sha = csrc_sha(family, copied=env.copied)  # before the run: what is measured is what was there when it began
        measured = run_family(family, ceilings, protocol, failures)
        if measured:  # otherwise what an earlier run has left stays
            print_table(console, family, rows(measured, sha))
            if args.out is not None or not args.quick:
                write_rows(folder(args, env, [family]) / f"{family}.jsonl", rows([*top, *measured], sha))
        if failures.stopped:
            break


def has_hopper() -> bool:
    """Whether the current CUDA device is a Hopper GPU."""
    return torch.cuda.is_available() and registry.is_hopper(torch.device("cuda", torch.cuda.current_device()))


def measuring(commit: str | None) -> Environment:
    """Describes this machine and tree. Raises ValueError where nothing can be measured."""
    if not has_hopper():
        raise ValueError("no Hopper GPU here; --dry-run checks the cases on a CPU")
    if registry.NATIVE_ERROR:
        raise ValueError(f"nothing to measure: {registry.NATIVE_ERROR}")
    return environment(commit)


def measure(args: argparse.Namespace, console: Console, failures: Failures) -> int:
    """Tests, sanitizer or benchmarks: what needs a Hopper GPU. ValueError where this machine or tree can not run them."""
    env = measuring(args.commit)
    if args.what[0] == "tests":
        from bench.suite import run_tests

        return run_tests(args.what[1:], folder(args, env, args.what[1:]), env)
    if args.what[0] == "sanitize":
        from bench.sanitize import run_sanitizer

        return run_sanitizer(args.what[1:], folder(args, env, args.what[1:]), env, console)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is worth writing
    run_benchmarks(args, env, console, failures)
    return 1 if failures.lines else 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if anything failed, 2 without a Hopper GPU or with a wrong command line."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    failures = Failures(console)
    if args.what[0] == "plot":
        from bench.plot import plot_all

        for path in plot_all(args.out or RESULTS):
            console.print(str(path), soft_wrap=True)
        return 0
    if args.dry_run:
        dry_run(args.what, console, failures)
        return 1 if failures.lines else 0
    try:
        return measure(args, console, failures)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
