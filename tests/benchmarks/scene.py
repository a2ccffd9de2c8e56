"""What every measurement stands on: parameters of the shapes that meta-training gives, a catalogue, a live database."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace

import psycopg2
import torch

from models.encoder import HashedBagOfWords
from models.item_fitting import PARTS
from models.meta_parameters import NUM_BUCKETS, MetaParameters
from models.table_fitting import NUM_DIMS, NUM_FACTORS, NUM_NEIGHBOURS
from pipeline import arithmetic, embedded_broker, embedded_database, registry, topics
from pipeline.adaptation import Adaptation, Types
from pipeline.artefacts import Artefacts
from pipeline.catalogue import Catalogue, ListedItem, build_catalogue
from pipeline.chunks import Chunk
from pipeline.loop import Loop
from pipeline.loop_versions import Sources
from pipeline.session import SESSION
from pipeline.settings import Settings
from pipeline.store import Store
from pipeline.support import UserTable
from pipeline.synthetic_messages import encoded_chunks
from pipeline.topics import topic_configs
from schemas.database import connect_engine, migrate
from schemas.events import parse_interaction
from tests.benchmarks.keys import NUM_PARTITIONS, TOPIC, item_ids, partition_of
from tests.factories import NOW_MS, Record, Sizes, meta_parameters

ENCODER = HashedBagOfWords(64)
NUM_ITEMS, NUM_USERS, SUPPORT_SIZE, TOP_N = 1682, 100_000, 60, 50


def parameters(num_items: int = NUM_ITEMS, *, num_factors: int = NUM_FACTORS, seed: int = 0) -> MetaParameters:
    """Random, in the shapes and about the magnitudes that meta-training gives, inner step on."""
    sizes = Sizes(NUM_DIMS, num_factors, NUM_NEIGHBOURS)
    drawn = meta_parameters(
        item_ids(num_items), text_dim=ENCODER.size, seed=seed, sizes=sizes, encoder=ENCODER.name, parts=PARTS
    )
    return replace(
        drawn,
        support_size=SUPPORT_SIZE,
        item_out=drawn.item_out / NUM_DIMS**0.5,
        item_spread=drawn.item_spread * 0.1,
        neighbour_values=drawn.neighbour_values * 0.1,
        item_factors=drawn.item_factors / num_factors**0.5,
        residual_mean=drawn.item_factors[0] * 0.01,
        metric=drawn.metric / num_factors,
        part_decays=torch.tensor([0.99, 0.9, 0.7, 0.99]),
        part_weights=torch.tensor([[1.0] + [0.5] * len(PARTS)]).repeat(NUM_BUCKETS, 1),
        calibration=torch.tensor([[1.5, -7.0]]).repeat(NUM_BUCKETS, 1),
    )


def catalogue(values: MetaParameters, device: str = "cpu") -> Catalogue:
    """Every trained item, listed."""
    items = [ListedItem(name, number, name, True, True) for number, name in enumerate(values.item_ids, 1)]
    return build_catalogue(1, items, ENCODER.encode([item.text for item in items]).to(device), values)


@dataclass(frozen=True)
class Deployment:
    """A broker and a migrated database with a catalogue and a live version, as a worker finds them."""

    home: pathlib.Path
    broker: str
    owner_url: str
    writer_url: str
    reader_url: str
    database_pid: int

    def environment(self, **more: object) -> dict[str, str]:
        values = {
            "broker": self.broker,
            "database_url": self.writer_url,
            "home": self.home,
            "encoder": f"hashed:{ENCODER.size}",
            "partitions": NUM_PARTITIONS,
            "support_size": SUPPORT_SIZE,
            "top_n": TOP_N,
            "user_events_per_minute": 0,  # Zipf's first user has 8 % of the events: none is to be dropped here
            **more,
        }
        return {f"INNERLOOP_{name.upper()}": str(value) for name, value in values.items()}


@dataclass(frozen=True)
class Options:
    """How to measure: `quick` gives seconds instead of minutes; `deploy` opens what the measurement stands on."""

    quick: bool
    repeats: int
    deploy: Callable[[int, bool], AbstractContextManager[Deployment]]


@contextmanager
def deployment(num_items: int, with_broker: bool) -> Iterator[Deployment]:
    """The embedded parts as `innerloop services up` starts them; commit times are tracked to measure freshness."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="innerloop-bench-"))
    try:
        socket_folder = embedded_database.start(folder, {"track_commit_timestamp": "on"})
        owner, writer, reader = (embedded_database.url(socket_folder, login) for login in embedded_database.LOGINS)
        migrate(owner)
        broker = embedded_broker.start(folder) if with_broker else ""
        process_id = embedded_database.daemon(folder).pid()
        assert process_id is not None
        yield filled(Deployment(folder, broker, owner, writer, reader, process_id), num_items)
    finally:
        embedded_broker.stop(folder)
        embedded_database.stop(folder)
        shutil.rmtree(folder)


def filled(parts: Deployment, num_items: int) -> Deployment:
    """The same with topics, a catalogue and a live version."""
    if parts.broker:
        topics.ensure_topics(parts.broker, topic_configs(Settings.load()), NUM_PARTITIONS)
    values = parameters(num_items)
    with closing(psycopg2.connect(parts.owner_url)) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO innerloop.catalogue_snapshots DEFAULT VALUES")
        cursor.execute(
            "INSERT INTO innerloop.items (item_id, text, snapshot) SELECT name, name, 1 FROM unnest(%s) AS name",
            (list(values.item_ids),),
        )
        connection.commit()
    engine = connect_engine(parts.owner_url)
    registry.register(engine, Artefacts(parts.home / "artefacts"), values, metrics={}, provenance={})
    engine.dispose()
    return parts


def make_loop(store: Store | str, values: MetaParameters, *, capacity: int = 50_000) -> Loop:
    """A worker's loop in this process, holding all partitions from offset 0; over a store or a writer's URL."""
    if isinstance(store, str):
        store = Store(connect_engine(store, options=SESSION), id_horizon=1000, seen_horizon=2000)
    table = UserTable(capacity, support_size=SUPPORT_SIZE, state_size=0, id_horizon=1000, seen_horizon=2000)
    loop = Loop(
        store,
        Adaptation(table, Types.of({}), top_n=TOP_N),
        Sources(lambda _: values, lambda texts, _: ENCODER.encode(texts)),
        topics=(TOPIC, "items"),
        parse=parse_interaction,
        dead_letter_limit=(0.5, 1000),
        accept_data_gap=False,
    )
    loop.wait_for_version()
    loop.take_over({(TOPIC, partition): (0, 10**9) for partition in range(NUM_PARTITIONS)})
    return loop


def batches(
    num_events: int,
    *,
    size: int,
    users: int = NUM_USERS,
    num_items: int = NUM_ITEMS,
    activity: float | None = 1.0,
    ends: list[int] | None = None,
) -> Iterator[list[Chunk]]:
    """Encoded clicks as a worker's micro-batches, partitioned by user as Kafka would; `ends` goes on behind others."""
    ends = ends or [0] * NUM_PARTITIONS
    ids = item_ids(num_items)
    for keys, values in encoded_chunks(num_events, users=users, item_ids=ids, activity=activity, chunk=size):
        rows: list[list[Record]] = [[] for _ in ends]
        for key, value in zip(keys, values, strict=True):
            partition = partition_of(key)
            rows[partition].append(Record(TOPIC, partition, ends[partition] + len(rows[partition]), NOW_MS, key, value))
        chunks = [Chunk(TOPIC, p, ends[p], ends[p] + len(part), part) for p, part in enumerate(rows) if part]
        ends[:] = [end + len(part) for end, part in zip(ends, rows, strict=True)]
        yield chunks


def one_thread() -> None:
    """As a worker computes."""
    arithmetic.prepare(1)
