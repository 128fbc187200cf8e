"""What must agree when it is over: the books of the clients, the database, and the folder of files."""

from collections.abc import Iterator
from pathlib import Path

import av

from benchmarks.serve_clients import COMPLETED, DELETED, OPEN, Client
from benchmarks.serve_fleet import Fleet


def database_problems(fleet: Fleet, clients: list[Client]) -> Iterator[str]:
    """A row for each video that was taken in, a bill for each that was completed, and its files under one attempt."""
    import sqlalchemy as sql

    from sora_train.serving.jobs.files import FileStore
    from sora_train.serving.jobs.tables import JOBS, USAGE
    from sora_train.serving.service import open_store
    from sora_train.serving.settings import Settings

    settings = Settings.model_validate(fleet.settings)
    database, files = open_store(settings).database, FileStore(settings.files_url)
    with database.read() as connection:
        rows = {row.id: row for row in connection.execute(sql.select(JOBS))}
        bills = list(connection.execute(sql.select(USAGE.c.job)).scalars())
    database.close()
    fates = {name: fate for one in clients for name, fate in one.fates.items()}
    for name in sorted(rows.keys() ^ fates.keys()):
        yield f"{name}: {'nobody asked for it' if name in rows else 'lost'}"
    for name in sorted(fates.keys() & rows.keys()):
        row = rows[name]
        if (fates[name] == DELETED) != (row.status == "cancelled") or fates[name] == OPEN:
            yield f"{name}: {fates[name]} for its client, {row.status} in the database"
        if row.status == COMPLETED:
            if bills.count(name) != 1:
                yield f"{name}: billed {bills.count(name)} times"
            found = files.names(f"outputs/{name}")
            if found != sorted(row.outputs.values()):
                yield f"{name}: files {found}, of which the job knows {sorted(row.outputs.values())}"


def file_problems(folder: Path, clients: list[Client], *, signed: bool) -> Iterator[str]:
    """Every file decodes to the frames that were told, and is signed where it should be."""
    for client in clients:
        for video in client.videos.values():
            if video["status"] != COMPLETED:
                continue
            path = client.folder / f"{video['id']}.mp4"
            try:
                with av.open(str(path)) as container:
                    frames = sum(1 for _ in container.decode(video=0))
            except (OSError, av.FFmpegError) as error:
                yield f"{video['id']}: does not decode: {error}"
                continue
            if frames != video["frames"]:
                yield f"{video['id']}: {frames} frames of {video['frames']}"
            if video["provenance"]["signed"] != signed:
                yield f"{video['id']}: signed is {video['provenance']['signed']}"
            if signed:
                yield from _signature_problems(folder, path)


def _signature_problems(folder: Path, path: Path) -> Iterator[str]:
    from sora_train.serving.provenance.certificates import read_anchors
    from sora_train.serving.provenance.verdict import verdict

    found = verdict(path, read_anchors(folder / "data/dev_certs/bench/anchors.pem"))
    if found.state != "Trusted" or found.title != path.name:
        yield f"{path.stem}: {found.state} {found.failures} as {found.title}"
