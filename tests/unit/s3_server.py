"""As much of S3 on loopback as checkpoints and shards take: GET, HEAD, ListObjectsV2, PUT, DELETE, and ways to fail."""

import os
import re
import urllib.parse
from collections import deque
from pathlib import Path
from xml.sax.saxutils import escape

from range_server import Handler, RangeServer


class S3Server(RangeServer):
    """The folders in `folder` are buckets, addressed by path. `faults` as of RangeServer; 503 is SlowDown.

    `put_faults` and `put_always` are those of writing: statuses.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, _S3Handler)
        self.put_faults: deque[str] = deque()
        self.put_always = ""

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.url("").rstrip("/"),
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class _S3Handler(Handler):
    server: S3Server

    def send_error(self, code: int, *_: object) -> None:
        name = {404: "NoSuchKey", 403: "AccessDenied", 503: "SlowDown"}.get(code, "InternalError")
        said = f"<Error><Code>{name}</Code><Message>{name}</Message></Error>"
        self._xml(code, said)

    def do_GET(self) -> None:  # noqa: N802 - the library's name
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if "list-type" in query:
            self.server.asked.append((self.path, "list"))
            self._list(query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        elif "Range" not in self.headers and self._path().is_file():
            self.server.asked.append((self.path, "whole"))
            self._send(200, self._path().read_bytes(), "binary/octet-stream")
        else:
            super().do_GET()

    def do_HEAD(self) -> None:  # noqa: N802
        path = self.server.folder / urllib.parse.urlsplit(self.path).path.lstrip("/")
        found = path.is_file()
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(path.stat().st_size if found else 0))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()

    def do_PUT(self) -> None:  # noqa: N802
        server, path = self.server, self._path()
        body = self._body()
        server.asked.append((self.path, "put"))
        fault = server.put_faults.popleft() if server.put_faults else server.put_always
        if fault:
            self.send_error(int(fault))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        self.send_response(200)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self) -> bytes:
        """What is sent: plain, or in the chunks of a body that is signed as it goes."""
        if self.headers.get("Expect") == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def do_DELETE(self) -> None:  # noqa: N802
        self._path().unlink(missing_ok=True)
        self.send_response(204)
        self.end_headers()

    def do_POST(self) -> None:  # noqa: N802
        """Only the removal of several keys."""
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        for key in re.findall("<Key>(.*?)</Key>", text):
            (self._path() / key).unlink(missing_ok=True)
        self._xml(200, "<DeleteResult></DeleteResult>")

    def _path(self) -> Path:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        return self.server.folder / path.lstrip("/")

    def _list(self, prefix: str, delimiter: str) -> None:
        bucket = urllib.parse.urlsplit(self.path).path.strip("/")
        root = self.server.folder / bucket
        contents, folders = "", set()
        for path in sorted(root.rglob("*")):
            key = path.relative_to(root).as_posix()
            if not path.is_file() or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            contents += (
                f"<Contents><Key>{escape(key)}</Key><Size>{os.path.getsize(path)}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>e</ETag></Contents>"
            )
        for name in sorted(folders):
            contents += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        self._xml(
            200,
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>",
        )

    def _xml(self, status: int, body: str) -> None:
        self._send(
            status, f'<?xml version="1.0" encoding="UTF-8"?>{body}'.encode(), "application/xml"
        )

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
