"""Settings: where they come from, and that a misspelt one is never ignored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.settings import Settings, masked
from schemas.errors import ConfigurationError


@pytest.fixture(autouse=True)
def no_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a deployment configured."""
    for name in [name for name in os.environ if name.startswith("INNERLOOP_")]:
        monkeypatch.delenv(name)


def test_a_variable_wins_over_the_file_and_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prod.toml"
    file.write_text('group = "shop"\ntop_n = 10\n[event_types.click]\nlabel = 1\nweight = 2.5\n')
    monkeypatch.setenv("INNERLOOP_CONFIG", str(file))
    monkeypatch.setenv("INNERLOOP_TOP_N", "20")
    settings = Settings.load()
    assert (settings.top_n, settings.group, settings.partitions) == (20, "shop", 4)
    assert settings.event_types["click"].weight == 2.5
    sources = settings.sources()
    assert (sources["top_n"], sources["group"], sources["partitions"]) == ("INNERLOOP_TOP_N", str(file), "default")


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_BROKER", "")
    assert Settings.load().broker is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("INNERLOOP_PARTITION", "INNERLOOP_PARTITIONS"),
        ("INNERLOOP_TOPIC_INTERACTION", "INNERLOOP_TOPIC_INTERACTIONS"),
        ("INNERLOOP_BROKERS", "INNERLOOP_BROKER"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_nearest_named(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigurationError, match=f"unknown variable {name}, did you mean {meant}\\?"):
        Settings.load()


def test_an_unknown_key_of_the_file_is_refused_and_the_nearest_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prod.toml"
    file.write_text("supportsize = 5\n")
    monkeypatch.setenv("INNERLOOP_CONFIG", str(file))
    with pytest.raises(
        ConfigurationError, match=r"unknown setting supportsize in .*prod\.toml, did you mean support_size"
    ):
        Settings.load()


@pytest.mark.parametrize("content", [None, "top_n = ", b"\xff"])
def test_a_file_that_cannot_be_read_is_a_configuration_error(
    content: str | bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prod.toml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("INNERLOOP_CONFIG", str(file))
    with pytest.raises(ConfigurationError, match=r"INNERLOOP_CONFIG=.*prod\.toml"):
        Settings.load()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOP_N", "0"),
        ("TOP_N", "many"),
        ("DEVICE", "tpu"),
        ("DEAD_LETTER_LIMIT", "1.5"),
        ("TOPIC_ITEMS", "a b"),
        ("FAILPOINTS", "before_commit=explode"),
        ("EVENT_TYPES", "{"),
        ("EVENT_TYPES", '{"click": {"label": 2}}'),
        ("EVENT_TYPES", '{"clik": {"label": 1}}'),
        ("EVENT_TYPES", '{"click": {"weight": -1}}'),
    ],
)
def test_a_value_out_of_its_range_names_its_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"INNERLOOP_{name}", value)
    with pytest.raises(ConfigurationError, match=rf"(?i)(INNERLOOP_{name}|\"{name}\")"):
        Settings.load()


def test_a_wrong_value_is_not_repeated_for_it_may_be_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_TOP_N", "hunter2")
    with pytest.raises(ConfigurationError) as error:
        Settings.load()
    assert "hunter2" not in str(error.value)


def test_half_a_deployment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_BROKER", "kafka:9092")
    settings = Settings.load()
    assert settings.broker_address() == "kafka:9092"
    with pytest.raises(ConfigurationError, match="INNERLOOP_BROKER is set but INNERLOOP_DATABASE_URL is not"):
        settings.database("reader")


def test_without_broker_and_database_the_embedded_ones_are_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INNERLOOP_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="innerloop services up"):
        Settings.load().connection("writer")


def test_the_home_folder_may_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_HOME", "~/loop")
    assert Settings.load().home == Path.home() / "loop"


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("postgresql://u:p@ss:w/rd@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:pw@h:5432/db?sslmode=require", "postgresql://u:***@h:5432/db?sslmode=require"),
        ("postgresql://h/db?user=u&password=pw&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("host=h password=pw user=u", "host=h password=*** user=u"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        (None, None),
    ],
)
def test_passwords_are_masked(secret: str | None, shown: str | None) -> None:
    assert masked(secret) == shown


def test_config_prints_no_password_and_exit_code_78_is_for_configuration() -> None:
    command = [sys.executable, "-m", "pipeline.cli", "config", "--json"]
    variables = {**os.environ, "INNERLOOP_DATABASE_URL": "postgresql://u:hunter2@h/db"}
    shown = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)["database_url"] == "postgresql://u:***@h/db"
    assert "hunter2" not in shown.stdout + shown.stderr
    refused = subprocess.run(command, env={**variables, "INNERLOOP_TOPN": "1"}, capture_output=True, text=True)
    assert refused.returncode == 78
    assert refused.stderr == "innerloop: unknown variable INNERLOOP_TOPN, did you mean INNERLOOP_TOP_N?\n"
