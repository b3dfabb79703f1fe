"""Run one of the benchmark tools: ``python -m bench NAME``, from the repository's root."""

import argparse
import sys
from importlib import import_module

# tool -> its folder and help text; the tool is a module of that folder with a `main(arguments)`
TOOLS = {
    "run": ("micro", "time operators, whole frames and single modules"),
    "gpu": ("micro", "measure the most important figures in a few minutes of a GPU"),
    "tune": ("micro", "search launch configs for this machine's GPU"),
    "engine": ("micro", "time many requests at once, and their memory"),
    "cpu": ("micro", "time packed weights on a CPU beside the public server's module"),
    "serve": ("micro", "time the speech server with many clients at once"),
    "host": ("micro", "measure the host's work between two frames, on a stand-in for a GPU"),
    "depth": ("micro", "compare the flow head with a depth transformer: bytes, launches, times"),
    "ledger": ("static", "compile every kernel for every architecture; --check compares with bench/ledger.csv"),
    "frame": ("static", "count the launches, bytes and multiply-adds of a frame in Triton's interpreter"),
    "roofline": ("static", "predict the time of a frame on each GPU"),
    "overlap": ("static", "check that overlapping kernels touch no memory before they wait"),
    "filling": ("static", "show how well each launch of a frame fills each GPU"),
    "search": ("static", "search for the tiles with the shortest predicted time"),
    "server_cost": ("static", "count the launches and bytes of the public server's flow head"),
    "errors": ("quality", "count the codes that rounding flips, against fp64"),
    "distortion": ("quality", "measure what fewer evaluations of the velocity network cost"),
    "recognition": ("quality", "count the words of the demo voice that a speech recogniser hears"),
    "quantization": ("quality", "measure what weights in 8 bits do to the sound"),
    "demo_voice": ("quality", "write the demo voice's checkpoint from trained weights"),
    "report": ("report", "measure on this machine, then write the page, the pictures and the tables"),
}


def main() -> int:
    """Run the tool that the command line names, and return the tool's exit status."""
    lines = "\n".join(f"  {name:12s} {what}" for name, (_, what) in TOOLS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=f"tools:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("tool", choices=TOOLS, metavar="NAME", help="one of the tools below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the tool's arguments; see NAME --help")
    options = parser.parse_args(sys.argv[1:] or ["--help"])
    folder, _ = TOOLS[options.tool]
    try:
        return int(import_module(f"bench.{folder}.{options.tool}").main(options.arguments))
    except ModuleNotFoundError as error:
        raise SystemExit(f"{options.tool} needs {error.name}: pip install -e '.[test,bench]'") from None


if __name__ == "__main__":
    sys.exit(main())
