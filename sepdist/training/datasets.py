"""Open the data of a run: training feeds by name, validation set and training stream."""

from typing import Any

from sepdist import seeding, slots
from sepdist.config import NEWEST_ORDER, ConfigError, TrainConfig
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.order import INTERLEAVES
from sepdist.data.records import MAIN
from sepdist.data.stream import Feed, TrainStream
from sepdist.training.world import World


def open_datasets(cfg: TrainConfig) -> tuple[dict[str, Feed], Dataset]:
    """Return feeds, `data.train`'s first, and the validation set; ConfigError if they misfit."""
    data = cfg.data
    if data.interleave not in INTERLEAVES:
        names = ", ".join(INTERLEAVES)
        raise ConfigError(f"data.interleave={data.interleave!r}: it is one of {names}")
    feeds = {MAIN: _open_main(cfg)}
    for one in data.extra:
        if one.name in feeds:
            named = f"two data sets are named {one.name!r}"
            raise ConfigError(f"data.extra: {named} ({MAIN!r} is that of data.train)")
        seed = seeding.derive(cfg.seed, "data set", one.name)
        dataset = _open(cfg, one.url, one.num_sources, one.noise)
        feeds[one.name] = Crops(
            dataset, seed=seed, crop_seconds=data.crop_seconds, speeds=one.speeds
        )
    return feeds, _open(cfg, data.validation, data.num_sources, data.noise)


def _open_main(cfg: TrainConfig) -> Feed:
    data = cfg.data
    options: dict[str, Any] = {"seed": cfg.seed, "crop_seconds": data.crop_seconds}
    if data.mixing is None:
        stored = _open(cfg, data.train, data.num_sources, data.noise)
        return Crops(stored, speeds=data.speeds, **options)
    if data.speeds:
        raise ConfigError("data.speeds are of stored mixtures; with mixing, set data.mixing.speeds")
    noise = data.mixing.get("noise")
    if data.noise != bool(noise):
        raise ConfigError(
            f"data.noise={data.noise} with data.mixing.noise={noise}: new mixtures have noise if a "
            "data set of noises is given; change one of them"
        )
    voices = _open(cfg, data.train, 1, False, members=["s1"])
    options |= {"dataset": voices, "num_sources": data.num_sources}
    return slots.build("mixing", data.mixing, **options)


def _open(cfg: TrainConfig, url: str, num_sources: int, noise: bool, **more: Any) -> Dataset:
    more |= {"cache_dir": cfg.data.cache_dir, "cache_gigabytes": cfg.data.cache_gigabytes}
    dataset = Dataset(url, num_sources=num_sources, noise=noise, **more)
    wanted, rate = cfg.sample_rate, dataset.manifest.sample_rate
    if rate != wanted:
        todo = f"shard it again at {wanted} Hz, or set sample_rate"
        raise ConfigError(f"{url} has {rate} Hz, sample_rate={wanted}: {todo}")
    return dataset


def open_stream(cfg: TrainConfig, feeds: dict[str, Feed], world: World) -> TrainStream:
    """Return the stream of this rank's batches."""
    data = cfg.data
    return TrainStream(
        feeds,
        seed=cfg.seed,
        num_virtual_shards=data.num_virtual_shards,
        micro_batch=data.micro_batch,
        rank=world.rank,
        world_size=world.size,
        num_threads=data.num_threads,
        prefetch_steps=data.prefetch_steps,
        max_damaged=data.max_damaged,
        weights={one.name: one.weight for one in data.extra if one.weight is not None},
        interleave=data.interleave,
        order=data.order or NEWEST_ORDER,
    )
