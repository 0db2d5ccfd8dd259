"""`parallel-decode`: the commands of all adapters whose requirements are installed.

An adapter's commands are a typer app named `app` in its module `cli`.
"""

import importlib
from pathlib import Path

from parallel_decode import adapters

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit('the command line needs typer: pip install "parallel-decode[demo]"') from None

app = typer.Typer(help="Autoregressive models that generate in parallel.", no_args_is_help=True, add_completion=False)


def collect() -> dict[str, str]:
    """Add the commands of every adapter; returns the adapters that were left out, and the modules that they miss."""
    missing = {}
    for path in sorted(path for folder in adapters.__path__ for path in Path(folder).glob("*/cli.py")):
        adapter = path.parent.name  # the others have no commands, and are not imported
        try:
            app.registered_commands += importlib.import_module(
                f"{adapters.__name__}.{adapter}.cli"
            ).app.registered_commands
        except ModuleNotFoundError as error:
            missing[adapter] = str(error.name)
    return missing


LEFT_OUT = collect()
if LEFT_OUT:
    needs = "; ".join(f"{adapter} needs {module}" for adapter, module in LEFT_OUT.items())
    app.info.epilog = f"Left out, as something is not installed: {needs}."


@app.callback()
def main() -> None:
    """Autoregressive models that generate in parallel."""
