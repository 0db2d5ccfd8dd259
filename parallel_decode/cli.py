"""`parallel-decode`: the commands of all adapters whose requirements are installed.

An adapter's commands are a typer app named `app` in its module `cli`, each of the class `_command_line.Command`.
"""

import importlib
from pathlib import Path
from typing import Annotated

from parallel_decode import _disk_cache, adapters

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit('the command line needs typer: pip install "parallel-decode[demo]"') from None

from parallel_decode._command_line import Command, Group

app = typer.Typer(
    cls=Group, help="Autoregressive models that generate in parallel.", no_args_is_help=True, add_completion=False
)


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


@app.callback(cls=Group)
def main() -> None:
    """Autoregressive models that generate in parallel."""


@app.command(cls=Command)
def cache(clear: Annotated[bool, typer.Option("--clear", help="forget it")] = False) -> None:
    """What was learnt on this machine: costs and gains of windows, checks of language models. PARALLEL_DECODE_CACHE names another folder, or is "off"."""
    folder = _disk_cache.folder()
    files = [] if folder is None else [path for path in sorted(folder.glob("*/*")) if path.is_file()]
    for kind in dict.fromkeys(path.parent.name for path in files):
        sizes = [path.stat().st_size for path in files if path.parent.name == kind]
        typer.echo(f"{kind}: {len(sizes)} files, {sum(sizes):,} bytes")
    for path in files if clear else []:
        path.unlink(missing_ok=True)
    where = (
        "nothing is kept"
        if folder is None
        else f"{'cleared' if clear and files else 'in' if files else 'nothing in'} {folder}"
    )
    typer.echo(where)
