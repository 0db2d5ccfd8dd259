"""`parallel-decode`: the commands of all adapters whose requirements are installed.

An adapter's commands are a typer app named `app` in its module `cli`.
"""

import importlib
import pkgutil

from parallel_decode import adapters

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit('the command line needs typer: pip install "parallel-decode[demo]"') from None

app = typer.Typer(help="Autoregressive models that generate in parallel.", no_args_is_help=True, add_completion=False)


def collect() -> dict[str, str]:
    """Add the commands of every adapter; returns the adapters that were left out, and the modules that they miss."""
    missing = {}
    for package in pkgutil.iter_modules(adapters.__path__):
        name = f"{adapters.__name__}.{package.name}.cli"
        try:
            app.registered_commands += importlib.import_module(name).app.registered_commands
        except ModuleNotFoundError as error:
            if error.name != name:  # otherwise it has no commands
                missing[package.name] = str(error.name)
    return missing


LEFT_OUT = collect()
if LEFT_OUT:
    needs = "; ".join(f"{adapter} needs {module}" for adapter, module in LEFT_OUT.items())
    app.info.epilog = f"Left out, as something is not installed: {needs}."


@app.callback()
def main() -> None:
    """Autoregressive models that generate in parallel."""
