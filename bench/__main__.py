"""Run one of the benchmark commands: ``python -m bench COMMAND``, from the repository's root."""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module

# command -> help text. Each command except `ledger` is a module of that name in this folder with a `main(arguments)`.
COMMANDS = {
    "ledger": "compile every kernel for every architecture and write bench/ledger.csv; --check compares with that file",
    "run": "time operators, whole frames and single modules",
    "report": "measure on this machine, then write the page, the pictures and the README's tables",
    "tune": "search launch configs for this machine's GPU",
}


def main() -> int:
    """Run the command that the command line names, and return the command's exit status."""
    lines = "\n".join(f"  {name:10s} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=f"commands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's arguments; see COMMAND --help")
    options = parser.parse_args()
    if options.command == "ledger":
        return _ledger(options.arguments)
    return int(import_module(f"bench.{options.command}").main(options.arguments))


def _ledger(arguments: Sequence[str]) -> int:
    from bench import ledger

    parser = argparse.ArgumentParser(prog="python -m bench ledger", description=COMMANDS["ledger"])
    parser.add_argument("--check", action="store_true", help="compare with bench/ledger.csv instead of writing it")
    check, start = parser.parse_args(arguments).check, time.perf_counter()
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
