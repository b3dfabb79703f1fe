"""The command lines of the tools of ``python -m bench``."""

import argparse


def parser_of(tool: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments of ``python -m bench TOOL``, without arguments yet.

    Its help has the lines of `description`, the tool's docstring, without the marks ``**`` and double backticks.
    """
    text = (description or "").replace("**", "").replace("``", "`")
    return argparse.ArgumentParser(
        prog=f"python -m bench {tool}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
