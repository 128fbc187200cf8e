"""The settings of `sora serve`: a YAML file whose keys are these, with the command's flags on top."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sora_train.config.explain import scalar
from sora_train.config.messages import validated
from sora_train.config.schema import MISSING, keys, plain
from sora_train.config.sections.base import Section
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import ConfigError, UserError

StrList = Annotated[tuple[str, ...], Field(strict=False)]


class BackendSettings(Section):
    kind: Literal["local", "openai"] = "local"
    """`local`: our sampler in the worker's process; `openai`: another server that speaks /v1/videos."""
    ckpt: str = ""
    """RUN or RUN@STEP that the local sampler loads."""
    url: str = ""
    """Address of the other server, such as http://gpu1:8000/v1."""
    key_env: str = ""
    """Environment variable that holds the other server's key."""
    dialect: Literal["auto", "vllm-omni", "sglang", "openai"] = "auto"
    """Which fields the other server knows beside OpenAI's."""
    names: dict[str, str] = {}
    """Name in requests -> model of the backend, such as `sora-2: quickstart`."""
    adapters: dict[str, str] = {}
    """Name in requests -> FILE or RUN[:WEIGHT]; requests may name these and no others."""
    fps: float = Field(24.0, gt=0)
    """Frames a second of the other server's model, for requests that name none."""
    poll_seconds: float = Field(1.0, gt=0)
    """Pause before the other server is asked again how far a video is."""
    answer_seconds: float = Field(60.0, gt=0)
    """Time within which the other server answers, uploads included."""
    download_seconds: float = Field(600.0, gt=0)
    """Time within which a video is downloaded from it."""
    download_bytes: int = Field(4 << 30, ge=1)
    """Largest video that is downloaded."""
    patience_seconds: float = Field(600.0, gt=0)
    """How long it may be away or in trouble before a job goes back into the queue."""
    job_seconds: float = Field(7200.0, gt=0)
    """How long it may keep a video without completing it, its own queue included; then the job fails."""


class LimitSettings(Section):
    requests_per_minute: int = Field(60, ge=0)
    """Videos and characters that one key may ask for in a minute, where `sora serve keys add` says nothing; 0: any."""
    concurrent: int = Field(4, ge=0)
    """Jobs of one key that may wait or run at once; 0: any number."""
    seconds: float = Field(60.0, gt=0)
    """Longest video in seconds that is made for one request."""
    fps: float = Field(60.0, gt=0)
    """Most frames a second."""
    pixels: int = Field(1920 * 1088, ge=4)
    """Most pixels of a frame."""
    upload_bytes: int = Field(256 << 20, ge=1)
    """Largest body of a request with files."""
    json_bytes: int = Field(32 << 20, ge=1)
    """Largest body of a request in JSON; images may lie in it as data URLs."""
    characters: int = Field(100, ge=0)
    """Characters that one key may keep; 0: any number."""
    queue: int = Field(10_000, ge=1)
    """Jobs of all keys that may wait; beyond it requests are answered 503."""


class PriceSettings(Section):
    model: str = "*"
    """Model of the price; `*` is every model that no other row names."""
    up_to: int = Field(1 << 20, ge=1)
    """Pixels of the shorter side up to which the price counts; the smallest row that holds a video is its price."""
    per_second: float = Field(0.0, ge=0)
    """Price of a second of video, in `currency`."""


class SigningSettings(Section):
    certificate: str = ""
    """PEM file of the certificate chain, the signer's own first."""
    key: str = ""
    """PEM file of the private key in PKCS#8."""
    callback: str = ""
    """`package.module:function` that signs bytes, for keys that stay in a KMS or HSM."""
    dev_cert: str = ""
    """Name of a development chain that is made in the data folder; nobody else trusts it."""
    timestamps: str = ""
    """Address of a time-stamping authority; empty: no time stamps, and no network."""


class SafetySettings(Section):
    policy: str = ""
    """YAML file of the policy; empty: the one that comes with the package; `none`: everything is made."""
    moderation_url: str = ""
    """Address of an OpenAI-style moderation endpoint that prompts are shown to as well."""
    moderation_key_env: str = ""
    """Environment variable that holds its key."""


class WebhookSettings(Section):
    url: str
    """Where `video.completed` and `video.failed` are posted."""
    secret: str = ""
    """`whsec_...`, which signs them; empty: the variable `secret_env`."""
    secret_env: str = ""
    """Environment variable that holds the secret."""
    key: str = ""
    """Id of the key whose jobs are told; empty: those of all keys."""


class Settings(Section):
    host: str = "127.0.0.1"
    """Address to listen on; one that others reach needs a key first."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0: any that is free."""
    data: str = "serve"
    """Folder of the database, the files and the work in progress."""
    database: str = ""
    """postgresql://USER:PASSWORD@HOST/NAME for several gateways or nodes; empty: SQLite in the data folder."""
    files: str = ""
    """Folder or address (s3://...) of videos and uploads; empty: in the data folder."""
    workers: int = Field(1, ge=0)
    """Worker processes that this command starts; 0: only the gateway, with `sora serve worker` elsewhere."""
    keep_hours: float = Field(24.0, gt=0)
    """Time after which a video's files are deleted."""
    poll_ms: int = Field(1000, ge=1)
    """How long clients are told to wait before they ask again (`openai-poll-after-ms`)."""
    size: str = ""
    """WIDTHxHEIGHT of a request that names none; empty: what the model was trained on."""
    duration: float = Field(0.0, ge=0)
    """Seconds of a request that names none; 0: what the model was trained on."""
    currency: str = "USD"
    """In which `prices` are."""
    prices: Annotated[tuple[PriceSettings, ...], Field(strict=False)] = ()
    """What a second of video costs; nothing where no row fits."""
    backend: BackendSettings = BackendSettings()
    limits: LimitSettings = LimitSettings()
    safety: SafetySettings = SafetySettings()
    signing: SigningSettings = SigningSettings()
    watermark_key: str = ""
    """File with the key of the invisible watermark; empty: one is made in the data folder; `none`: no watermark."""
    webhooks: Annotated[tuple[WebhookSettings, ...], Field(strict=False)] = ()
    """Who is told of jobs that end."""

    @field_validator("size")
    @classmethod
    def _size(cls, text: str) -> str:
        if text and parse_size(text) is None:
            raise ValueError(f"must be WIDTHxHEIGHT in even pixels, such as 1280x720, got '{text}'")
        return text

    @classmethod
    def read(cls, config: Path | None = None, **flags: Any) -> "Settings":
        """The file's settings with `flags` (dotted names with `__`, None where not given) over them.

        Raises UserError for a file that cannot be read, an unknown key, an impossible value.
        """
        values = load_yaml(config) if config is not None else {}
        sources = {name: str(config) for name in values}
        for name, value in flags.items():
            if value is None:
                continue
            section, _, key = name.rpartition("__")
            inner = values.setdefault(section, {}) if section else values
            if not isinstance(inner, dict):
                raise UserError(f"{config}: '{section}' must hold keys of its own, got {inner!r}")
            inner[key] = value
            sources.pop(section or key, None)
        try:
            return validated(cls, values, sources)
        except ConfigError as error:
            told = str(error).replace("`sora config show`", "`sora serve --settings`")
            raise UserError(told) from None

    @property
    def folder(self) -> Path:
        return Path(self.data).expanduser()

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder.absolute() / 'jobs.db'}"

    @property
    def files_url(self) -> str:
        return self.files or str(self.folder.absolute() / "files")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def listing() -> str:
    """Every setting with what it may be, its default and its meaning, in the order of the file."""
    lines = []
    for name, key in keys(Settings).items():
        default = "" if key.default == MISSING else f", default {scalar(plain(key.default))}"
        lines += [f"{name}: {key.allowed}{default}", f"    {key.doc}"]
    return "\n".join(lines)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of `1280x720`; None of anything else. Both are even, as H.264 wants them."""
    width, cross, height = (text or "").partition("x")
    numbers = (width, height)
    # `isdecimal` alone takes digits of other scripts; a number of six digits is no size.
    if not cross or not all(n.isascii() and n.isdecimal() and len(n) < 6 for n in numbers):
        return None
    size = int(width), int(height)
    return size if all(n > 0 and n % 2 == 0 for n in size) else None
