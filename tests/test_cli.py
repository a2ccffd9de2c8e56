"""The command line as people and programs meet it: --help, exit codes, one clear line when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.cli_output import columns
from tests.brokers import Tansu
from tests.conftest import Database

COMMANDS = (
    "demo", "services up", "services down", "services status", "migrate", "meta-train", "worker", "config",
    "produce", "items", "dataset ml-100k", "dataset synthetic", "recommend", "explain", "status", "metrics",
    "dead-letters list", "dead-letters replay", "models list", "models show", "models promote", "models rollback",
    "trainer", "backtest", "bench", "forget", "search", "monitor", "drift status", "drift explain",
    "drift freeze", "drift unfreeze",
)  # fmt: skip
EVENT = {"user_id": "u1", "item_id": "i1", "type": "click", "ts": 1_700_000_000_000}


def innerloop(*words: str, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with these INNERLOOP_* variables and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("INNERLOOP_")}
    named = {f"INNERLOOP_{name}": value for name, value in variables.items()}
    command = [sys.executable, "-m", "pipeline.cli", *words]
    return subprocess.run(command, env={**inherited, **named}, input=stdin, capture_output=True, text=True)


@pytest.fixture
def deployment(broker: Tansu, database: Database, tmp_path: Path) -> dict[str, str]:
    """The variables of an owner; other logins by `as_role`."""
    variables = {"BROKER": broker.address, "DATABASE_URL": database.owner_url, "HOME": str(tmp_path)}
    assert innerloop("migrate", **variables).returncode == 0
    return variables


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_teaches_by_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert "Example" in shown.stdout
    assert "innerloop " + command in shown.stdout.split("Example", 1)[1]


def test_the_overview_lists_every_command_and_no_other() -> None:
    shown = innerloop("--help").stdout.split("Commands:\n")[1]
    assert {line.split()[0] for line in shown.splitlines() if line.strip()} == {name.split()[0] for name in COMMANDS}


def test_help_imports_neither_torch_nor_sqlalchemy_nor_kafka() -> None:
    code = "import sys; sys.argv = ['innerloop', '--help']\nimport pipeline.cli\n"
    code += "try: pipeline.cli.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'sqlalchemy', 'kafka', 'faust', 'transformers', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["produce"],
        ["recommend", "u1", "-k", "0"],
        ["recommend", "u1", "-k", "1001"],
        ["dead-letters", "replay"],
        ["meta-train"],
        ["meta-train", "file", "--from-topic"],
        ["meta-train", "file", "--learner", "ridge", "--adapter", "lora"],
        ["produce", "-", "--pass-through", "--mapping", "m.toml"],
    ],
)
def test_wrong_usage_exits_2(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 2


@pytest.mark.parametrize("words", [["status"], ["recommend", "u1"], ["migrate"], ["worker"], ["items", "-"]])
def test_without_services_every_command_says_what_starts_them(words: list[str], tmp_path: Path) -> None:
    done = innerloop(*words, HOME=str(tmp_path))
    assert done.returncode == 78
    assert "innerloop services up" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broker_that_does_not_answer_is_one_line_and_exit_code_1() -> None:
    done = innerloop("produce", "-", stdin="{}", BROKER="127.0.0.1:1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("innerloop: no Kafka broker answers at 127.0.0.1:1 (INNERLOOP_BROKER)")


def test_a_database_that_does_not_answer_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = innerloop("recommend", "u1", DATABASE_URL=f"postgresql://u:hunter2@/db?host={tmp_path}")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "hunter2" not in done.stderr


def test_a_database_without_the_schema_names_migrate(services: object, database: Database) -> None:
    empty = database.owner_url.replace(database.name, "postgres")
    done = innerloop("recommend", "u1", DATABASE_URL=empty)
    assert done.returncode == 78
    assert "innerloop migrate" in done.stderr


def test_migrate_twice_changes_nothing_and_other_partitions_are_refused(deployment: dict[str, str]) -> None:
    again = innerloop("migrate", "--json", **deployment)
    assert json.loads(again.stdout) == {"topics_made": [], "partitions": 4}
    refused = innerloop("migrate", PARTITIONS="8", **deployment)
    assert refused.returncode == 78
    assert "has 4 partitions, INNERLOOP_PARTITIONS says 8" in refused.stderr


def test_produce_reports_bad_lines_by_number_and_exits_1(deployment: dict[str, str]) -> None:
    lines = "\n".join([json.dumps(EVENT), "{", json.dumps({**EVENT, "type": "clik"}), json.dumps(EVENT)])
    done = innerloop("produce", "-", "--json", stdin=lines, **deployment)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["sent"], found["malformed"], found["failed"]) == (2, 2, 0)
    assert found["reasons"] == {"BAD_JSON": 1, "BAD_TYPE": 1}
    assert done.stderr.splitlines()[0].startswith("line 2: BAD_JSON: ")
    assert done.stderr.splitlines()[1].startswith("line 3: BAD_TYPE: ")


@pytest.mark.parametrize(
    ("command", "remedy"), [("produce", "--mapping FILE.toml"), ("items", "needs item_id and a text")]
)
def test_a_file_without_one_good_line_is_answered_with_what_a_line_needs(
    deployment: dict[str, str], command: str, remedy: str
) -> None:
    done = innerloop(command, "-", "--format", "csv", stdin="foo,bar\n1,2\n", **deployment)
    assert done.returncode == 1
    assert remedy in done.stderr


def test_a_database_that_is_not_reached_is_named_by_its_setting(tmp_path: Path) -> None:
    url = "postgresql://writer:secret@127.0.0.1:1/innerloop"
    away = innerloop("status", BROKER="127.0.0.1:1", DATABASE_URL=url, HOME=str(tmp_path))
    assert (away.returncode, away.stderr.count("\n")) == (1, 1)
    assert "INNERLOOP_DATABASE_URL" in away.stderr
    assert "secret" not in away.stderr


def test_meta_train_says_before_it_reads_a_history_that_no_catalogue_is_given(
    deployment: dict[str, str], database: Database
) -> None:
    alone = {"DATABASE_URL": database.writer_url, "HOME": deployment["HOME"]}
    refused = innerloop("meta-train", "not-read.jsonl", **alone)
    assert (refused.returncode, "give --items FILE" in refused.stderr) == (78, True), refused.stderr


def test_meta_train_tells_items_without_text_while_it_begins(deployment: dict[str, str], database: Database) -> None:
    variables = {**deployment, "DATABASE_URL": database.writer_url, "ENCODER": "hashed"}
    done = innerloop("meta-train", "-", stdin=json.dumps(EVENT), **variables)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 items have no text" in done.stderr
    assert "fit tables on everything: 0 of 1" in done.stderr, "a stage is told when it begins"


def test_produce_of_good_lines_exits_0_and_passes_bad_ones_when_told(deployment: dict[str, str]) -> None:
    good = innerloop("produce", "-", stdin=json.dumps(EVENT), **deployment)
    assert (good.returncode, good.stdout.split(" in ")[0]) == (0, "1 sent to interactions")
    raw = innerloop("produce", "-", "--pass-through", stdin="{nonsense\n", **deployment)
    assert raw.returncode == 0


def test_control_characters_of_a_bad_line_do_not_reach_the_terminal(deployment: dict[str, str]) -> None:
    done = innerloop("produce", "-", stdin='{"user_id": "\\u001b[2J", "\x1b[31m": 1}\n', **deployment)
    assert "\x1b" not in done.stderr


def test_a_table_shows_control_characters_and_obeys_none() -> None:
    assert columns(("id", "n"), [("a\x1b[2J\n", 1), ("b", 22)]).splitlines() == [
        "id           n",
        "a\\x1b[2J\\n   1",
        "b           22",
    ]


def test_items_feeds_the_catalogue(deployment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "items.csv"
    file.write_text("item_id,title\na,Alpha\nb,Beta\n")
    done = innerloop("items", str(file), "--json", **deployment)
    assert (done.returncode, json.loads(done.stdout)["sent"]) == (0, 2)


def test_status_and_recommend_speak_json(deployment: dict[str, str], database: Database) -> None:
    variables = {**deployment, "DATABASE_URL": database.reader_url}
    found = json.loads(innerloop("status", "--json", **variables).stdout)
    assert (found["partitions"], found["lag"], found["live_version"], found["monitor"]) == ([], 0, None, "absent")
    assert json.loads(innerloop("recommend", "u1", "--json", **variables).stdout) == []
    assert "innerloop meta-train" in innerloop("status", **variables).stdout


def test_a_replay_with_the_readers_login_is_refused(deployment: dict[str, str], database: Database) -> None:
    done = innerloop("dead-letters", "replay", "--all", **{**deployment, "DATABASE_URL": database.reader_url})
    assert done.returncode == 78
    assert "innerloop_writer" in done.stderr


def test_a_synthetic_stream_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = innerloop("dataset", "synthetic", "--out", str(tmp_path / name), "--users", "20", "--items", "30",
                         "--events", "200", "--seed", "3")  # fmt: skip
        assert done.returncode == 0, done.stderr
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [file.name for file in files[0]] == ["interactions.jsonl.gz", "items.jsonl"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m pipeline.cli config | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)  # noqa: S602 - our own command
    assert "Traceback" not in done.stderr
