"""Every setting of innerloop: `INNERLOOP_*` variables over a TOML file over defaults.

A misspelt setting must not be ignored: an unknown variable or key ends the command and names the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from schemas.errors import ConfigurationError
from schemas.event_types import NAMES

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from pipeline.services import Endpoints

PREFIX = "INNERLOOP_"
CONFIG_VARIABLE = "INNERLOOP_CONFIG"
Role = Literal["owner", "writer", "reader"]
_SECRETS = (re.compile(r"(?<=://)([^:/@]*):(.*)(?=@)"), re.compile(r"(?i)(?<=password=)[^&\s]+"))


class EventTypeSetting(BaseModel):
    """What an event type teaches: a label (1 liked, 0 refused, none: exposure only) and a weight ≥ 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: Literal[0, 1] | None = None
    weight: float = Field(default=1.0, ge=0, le=1000, allow_inf_nan=False)


class Settings(BaseSettings):
    """All settings, validated. Functions elsewhere take the few numbers they need, not this object."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    broker: str | None = Field(
        None, description="Kafka: host:port,… or sasl_ssl://user:password@host:port,…; unset: embedded"
    )
    database_url: str | None = Field(
        None, repr=False, description="PostgreSQL of the role that the command needs; unset: the embedded database"
    )
    group: str = Field("innerloop", min_length=1, description="Kafka consumer group; one database serves one group")
    topic_interactions: str = Field("interactions", pattern=r"^[A-Za-z0-9._-]{1,249}$", description="events in")
    topic_items: str = Field("items", pattern=r"^[A-Za-z0-9._-]{1,249}$", description="catalogue in, compacted")
    topic_erasures: str = Field("erasures", pattern=r"^[A-Za-z0-9._-]{1,249}$", description="users to forget")
    home: Path = Field(
        default_factory=lambda: Path.home() / ".innerloop", description="embedded services, caches and artefacts"
    )
    artefacts: str | None = Field(
        None, description="folder or URL (s3://bucket/…) of the versions' artefacts; unset: artefacts/ in home"
    )
    partitions: int = Field(4, ge=1, le=10_000, description="partitions of each topic; fixed once made")
    support_size: int = Field(60, ge=1, le=10_000, description="newest positives kept per user")
    seen_items: int = Field(2000, ge=0, le=100_000, description="newest seen items kept per user")
    dedup_events: int = Field(1000, ge=0, le=100_000, description="event ids remembered per user")
    top_n: int = Field(50, ge=1, le=1000, description="scores stored per user")
    user_events_per_minute: int = Field(
        6000, ge=0, le=60_000_000, description="events of one user applied per minute of Kafka's time; 0: no limit"
    )
    cache_users: int = Field(50_000, ge=1, description="users held in memory by one worker")
    batch_events: int = Field(2048, ge=1, le=1_000_000, description="most events of one transaction")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="where the inner loop runs: cpu, cuda")
    torch_threads: int = Field(1, ge=1, le=256, description="threads of one worker's arithmetic")
    recommend_seen: bool | None = Field(None, description="recommend seen items again; unset: as learnt")
    event_types: dict[str, EventTypeSetting] = Field(
        default_factory=dict, description="label and weight by event type; those not named keep their defaults"
    )
    mapping: Path | None = Field(None, description="TOML file that maps foreign JSON onto our events")
    encoder: str = Field("auto", min_length=1, description="text encoder: auto, hashed, a model name or folder")
    dead_letter_limit: float = Field(0.5, gt=0, le=1, description="share of dead letters that stops a worker")
    dead_letter_window: int = Field(1000, ge=1, description="events over which that share is taken")
    session_timeout_seconds: float = Field(6.0, gt=0, le=300, description="Kafka session timeout; Kafka wants ≥ 6")
    trainer_holdout: float = Field(
        0.2, gt=0, lt=1, description="share of a request's window, its end, kept from training to judge on"
    )
    trainer_attempts: int = Field(5, ge=1, description="trainers that may die on a request before it is given up")
    promote_events: int = Field(2000, ge=1, description="later events that a challenger is judged on at least")
    promote_users: int = Field(100, ge=1, description="users that they come from at least")
    canary_share: float = Field(0.05, gt=0, le=1, description="share of the partitions of a canary; one at least")
    canary_events: int = Field(1000, ge=1, description="events after which a canary goes live if it is not worse")
    canary_hours: float = Field(24.0, gt=0, description="hours after which a canary without a verdict is taken back")
    drift_seconds: float = Field(5.0, gt=0, le=30, description="how often the monitor reads the record")
    drift_record_hours: float = Field(24.0, gt=0, description="how long the record is exact; hours of it are kept on")
    drift_delta: float = Field(0.005, gt=0, lt=1, description="ADWIN's significance over all labels")
    drift_segment_delta: float = Field(0.0005, gt=0, lt=1, description="the same within one segment")
    drift_days: int = Field(1, ge=0, le=7, description="whole days to be seen before an alarm counts")
    drift_least_worse: float = Field(0.02, ge=0, description="rise of the loss that matters, relative")
    drift_standard_errors: float = Field(3.0, ge=0, description="standard errors that it must exceed as well")
    drift_labels: int = Field(2000, ge=1, description="labels that the evidence needs")
    drift_users: int = Field(500, ge=1, description="users that it needs")
    drift_user_weight: float = Field(0.01, gt=0, le=1, description="largest share of one user in the evidence")
    drift_new_labels: int = Field(5000, ge=1, description="labels since the alarm, to learn from")
    drift_cool_down_hours: float = Field(6.0, ge=0, description="between retrainings; or so many labels:")
    drift_cool_down_labels: int = Field(50_000, ge=0, description="both double with each rejected challenger")
    drift_per_day: int = Field(4, ge=0, description="retrainings in 24 hours at most")
    drift_dead_letters: float = Field(
        0.01, ge=0, le=1, description="share of dead letters above which none is asked for"
    )
    drift_top_share: float = Field(0.2, ge=0, le=1, description="of the excess loss, that 1 % of the users may cause")
    drift_cost: float = Field(50.0, ge=0, description="of a retraining, in nats that a day's labels must save")
    failpoints: str = Field("", description="tests only: name=crash|error|sleep:ms,…")
    accept_data_gap: bool = Field(False, description="go on after events that the broker no longer has")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments over variables over the TOML file named by INNERLOOP_CONFIG; no .env file."""
        path = os.environ.get(CONFIG_VARIABLE)
        file = (TomlConfigSettingsSource(settings_cls, toml_file=Path(path)),) if path else ()
        return init_settings, env_settings, *file

    @field_validator("home", "mapping")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path else path

    @field_validator("event_types")
    @classmethod
    def _event_types_exist(cls, value: dict[str, EventTypeSetting]) -> dict[str, EventTypeSetting]:
        for name in value:
            if name not in NAMES:
                raise ValueError(f"the contract has no event type {name[:40]!r}{nearest(name, NAMES)}")
        return value

    @field_validator("failpoints")
    @classmethod
    def _failpoints_have_actions(cls, value: str) -> str:
        for part in filter(None, value.split(",")):
            if not re.fullmatch(r"\w+=(crash|error|sleep:\d+)", part.strip()):
                raise ValueError(f"{part!r} is not name=crash, name=error or name=sleep:milliseconds")
        return value

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Read variables and file; `overrides` win over both.

        Raises ConfigurationError, one line per fault, for unknown names, wrong values and an unreadable file.
        """
        faults = [*_unknown_variables(os.environ), *_file_faults(os.environ.get(CONFIG_VARIABLE))]
        if faults:
            raise ConfigurationError("; ".join(faults))
        try:
            return cls(**overrides)
        except ValidationError as invalid:
            raise ConfigurationError("; ".join(_sentence(fault) for fault in invalid.errors())) from None
        except SettingsError as unreadable:
            raise ConfigurationError(f"{unreadable}: not JSON") from None

    def broker_address(self) -> str:
        """Return host:port,… of the broker; with neither broker nor database set, of the embedded one.

        Raises ConfigurationError when only the database is set: half a deployment is an accident.
        """
        if self.broker:
            return self.broker
        self._refuse_half(missing="INNERLOOP_BROKER", present=self.database_url and "INNERLOOP_DATABASE_URL")
        return self._endpoints().broker

    def database(self, role: Role) -> str:
        """Return the database URL for a command that needs `role`, embedded as in `broker_address`."""
        if self.database_url:
            return self.database_url
        self._refuse_half(missing="INNERLOOP_DATABASE_URL", present=self.broker and "INNERLOOP_BROKER")
        url: str = getattr(self._endpoints(), f"{role}_url")
        return url

    def artefacts_place(self) -> str:
        """Return the folder or URL where versions' artefacts lie."""
        return self.artefacts or str(self.home / "artefacts")

    def connection(self, role: Role) -> tuple[str, str]:
        """Return (broker address, database URL of `role`)."""
        return self.broker_address(), self.database(role)

    def _endpoints(self) -> Endpoints:
        from pipeline import services  # imported late: only the embedded default needs it

        return services.endpoints(self.home)

    @staticmethod
    def _refuse_half(*, missing: str, present: str | None) -> None:
        if present:
            raise ConfigurationError(f"{present} is set but {missing} is not: set both, or neither to use the embedded")

    def shown(self) -> dict[str, Any]:
        """Return every setting as JSON values, with passwords masked."""
        values = self.model_dump(mode="json")
        return values | {"database_url": masked(self.database_url), "broker": masked(self.broker)}

    def sources(self) -> dict[str, str]:
        """Say for every setting where its value came from: the variable, the file, or the default."""
        file = os.environ.get(CONFIG_VARIABLE)
        in_file = _read_toml(file) if file else {}
        return {
            name: PREFIX + name.upper()
            if os.environ.get(PREFIX + name.upper())
            else f"{file}"
            if name in in_file
            else "default"
            for name in type(self).model_fields
        }


def masked(text: str | None) -> str | None:
    """Replace passwords in a URL or DSN by stars; the rest stays readable."""
    if text is None:
        return None
    text = _SECRETS[0].sub(r"\1:***", text)
    return _SECRETS[1].sub("***", text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean X?` for the known name most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE}
    return [
        f"unknown variable {name}{nearest(name, known)}"
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known
    ]


def _file_faults(path: str | None) -> list[str]:
    if not path:
        return []
    try:
        keys = _read_toml(path)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as unreadable:
        return [f"{CONFIG_VARIABLE}={path}: {unreadable}"]
    known = list(Settings.model_fields)
    return [f"unknown setting {key} in {path}{nearest(key, known)}" for key in keys if key not in known]


def _read_toml(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        return tomllib.load(file)


def _sentence(fault: ErrorDetails) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    # The value is not echoed: it may hold a password.
    return f"setting {place} ({PREFIX}{place.split('.')[0].upper()}): {fault['msg']}"
