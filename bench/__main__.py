"""``python -m bench ledger`` and ``python -m bench run``, from the repository's root."""

import argparse
import sys
import time


def main() -> int:
    """Do what the command line asks; 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ledger = commands.add_parser(
        "ledger", help="compile every kernel for every architecture and write bench/ledger.csv"
    )
    ledger.add_argument("--check", action="store_true", help="compare with bench/ledger.csv instead of writing it")
    run = commands.add_parser("run", help="time every operator")
    run.add_argument("operators", nargs="*", help="their names; none = all")
    run.add_argument("--device", default="cpu", help="cpu: plain PyTorch only; cuda: the kernels as well")
    options = parser.parse_args()
    if options.command == "ledger":
        return _ledger(options.check)
    from bench.run import report

    report(options.operators, options.device)
    return 0


def _ledger(check: bool) -> int:
    from bench import ledger

    start = time.perf_counter()
    if check:
        found = ledger.check()
    else:
        rows = ledger.compute()
        ledger.FILE.write_text(ledger.write(rows))
        found = ledger.faults(rows)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"ledger: {len(found)} complaints, {time.perf_counter() - start:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
