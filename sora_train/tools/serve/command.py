"""`sora serve`, its workers and its keys: flags and help."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_train.errors import UserError
from sora_train.tools.serve.policy import policy_app
from sora_train.tools.terminal import JsonFile, command_group, table_of, write_json

if TYPE_CHECKING:
    from sora_train.serving.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.yaml", help="Settings; `sora serve --settings` lists all of them."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder of the database, the files and work in progress."),
]
Database = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="postgresql://USER:PASSWORD@HOST/NAME in place of SQLite in DIR."
    ),
]
Files = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Folder or address (s3://...) of videos and uploads."),
]
Ckpt = Annotated[
    str | None, typer.Option(metavar="RUN[@STEP]", help="The run that makes the videos.")
]

serve_app = typer.Typer(add_completion=False, rich_markup_mode=None)


@serve_app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    ckpt: Ckpt = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; any but 127.0.0.1 needs a key first.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data: Data = None,
    database: Database = None,
    files: Files = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes of this command; 0: the gateway alone.")
    ] = None,
    dev_cert: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Sign with a development certificate, which nobody else trusts."
        ),
    ] = None,
    config: Config = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="List all settings, and stop.")
    ] = False,
) -> None:
    """Serve videos as OpenAI's /v1/videos does: jobs that survive, keys, cost, safety and provenance.

    \b
    sora serve --ckpt runs/quickstart --port 8123 --data serve
    sora serve --config serve.yaml
    sora serve keys add alice --concurrent 2 --data serve
    sora serve worker --config serve.yaml

    On this machine no key is needed until one is added; other addresses refuse to start without one. Client programs
    use base_url="http://127.0.0.1:8123/v1"; http://127.0.0.1:8123/docs lists what they may send.
    """
    given = {
        "backend__ckpt": ckpt,
        "host": host,
        "port": port,
        "data": data,
        "database": database,
        "files": files,
        "workers": workers,
        "signing__dev_cert": dev_cert,
    }
    if context.invoked_subcommand is not None:
        early = [name.rpartition("__")[2] for name, value in given.items() if value is not None]
        if config is not None or early:
            flag = (early or ["config"])[0].replace("_", "-")
            raise UserError(f"--{flag} stands before `{context.invoked_subcommand}`; put it behind")
        return
    if settings:
        from sora_train.serving.settings import listing

        print(listing())
        return
    read = _settings(config, **given)
    from sora_train.serving.gateway import run

    run(read)


@serve_app.command()
def worker(
    config: Config = None,
    ckpt: Ckpt = None,
    data: Data = None,
    database: Database = None,
    files: Files = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Make the videos that a gateway elsewhere takes in; both see one database and one file store.

    \b
    sora serve --workers 0 --config serve.yaml         (on one machine)
    sora serve worker --config serve.yaml              (on each machine with a GPU)
    srun --ntasks 8 sora serve worker --config serve.yaml
    """
    given = {"backend__ckpt": ckpt, "data": data, "database": database, "files": files}
    read = _settings(config, **given)
    from sora_train.serving.worker_process import run_worker

    run_worker(read, with_parent=with_parent)


keys_app = command_group(
    "The API keys of a server: only their hashes are kept, so each is shown once."
)
serve_app.add_typer(keys_app, name="keys")
serve_app.add_typer(policy_app, name="policy")


@keys_app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    days: Annotated[
        float | None, typer.Option(min=0, help="Days until it expires; never if left out.")
    ] = None,
    rate: Annotated[
        int | None, typer.Option(min=0, help="Videos it may ask for a minute; 0: any number.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(min=0, help="Jobs that may wait or run at once; 0: any number.")
    ] = None,
    seconds_per_month: Annotated[
        float | None, typer.Option(min=0, help="Seconds of video a calendar month (UTC).")
    ] = None,
    cost_per_month: Annotated[
        float | None,
        typer.Option(min=0, help="Cost a calendar month, by the prices of the settings."),
    ] = None,
    config: Config = None,
    data: Data = None,
    database: Database = None,
) -> None:
    """Make a key and print it; from the first one on every request needs one.

    \b
    sora serve keys add alice --data serve
    sora serve keys add trial --days 7 --rate 5 --concurrent 1 --seconds-per-month 60 --data serve
    """
    keys, audit = _access(config, data, database)
    limits = {
        "requests_per_minute": rate,
        "concurrent": concurrent,
        "seconds_per_month": seconds_per_month,
        "cost_per_month": cost_per_month,
    }
    key, secret = keys.add(name, days=days, **limits)
    audit.note("key.added", owner="operator", subject=key.id, name=name, days=days, **limits)
    print(f"{key.id} of {name}; the key itself, which is shown this once:")
    print(secret)


@keys_app.command()
def revoke(
    which: Annotated[str, typer.Argument(metavar="ID|NAME")],
    config: Config = None,
    data: Data = None,
    database: Database = None,
) -> None:
    """End a key at once; its videos stay until they expire.

    \b
    sora serve keys revoke alice --data serve
    """
    keys, audit = _access(config, data, database)
    key = keys.revoke(which)
    audit.note("key.revoked", owner="operator", subject=key.id, name=key.name)
    print(f"{key.id} of {key.name} is revoked")


@keys_app.command("ls")
def list_keys(
    config: Config = None, data: Data = None, database: Database = None, json: JsonFile = ""
) -> None:
    """List the keys with their limits and what they used this month.

    \b
    sora serve keys ls --data serve
    """
    keys, _ = _access(config, data, database)
    rows = keys.report()
    if json:
        write_json(rows, json)
    if json == "-":
        return
    columns = ("id", "name", "ends with", "state", "rate", "at once", "s/month", "used s", "cost")
    names = ["id", "name", "ends_with", "state", "requests_per_minute", "concurrent"]
    names += ["seconds_per_month", "used_seconds", "used_cost"]
    print(table_of(columns, [tuple(_cell(row[name]) for name in names) for row in rows]))


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _settings(config: Path | None, **flags: Any) -> "Settings":
    """Raises UserError, also where the extra is not installed."""
    try:
        import sora_train.serving.service  # noqa: F401
        from sora_train.serving.settings import Settings
    except ModuleNotFoundError as error:
        raise UserError(
            f"`sora serve` needs the package {error.name}; install it with: pip install 'sora_train[serve]'"
        ) from None
    return Settings.read(config, **flags)


def _access(config: Path | None, data: str | None, database: str | None) -> tuple[Any, Any]:
    """The keys and the audit log of a server."""
    settings = _settings(config, data=data, database=database)
    from sora_train.serving.access.audit import Audit
    from sora_train.serving.access.keys import Keys
    from sora_train.serving.service import open_store

    store = open_store(settings)
    return Keys(store.database), Audit(store.database)
