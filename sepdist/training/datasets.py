"""The data of a run: its config in, what it trains on (feeds by name) and the validation set out."""

from sepdist import config, seeding
from sepdist.config import ConfigError, TrainConfig
from sepdist.data.crops import Crops
from sepdist.data.dataset import Dataset
from sepdist.data.order import INTERLEAVES
from sepdist.data.records import MAIN
from sepdist.data.stream import Feed


def open_datasets(cfg: TrainConfig) -> tuple[dict[str, Feed], Dataset]:
    """The feeds, that of `data.train` first, and the validation set; their sample rate must be the run's."""
    data = cfg.data
    seconds = data.crop_seconds
    if data.mixing is None:
        main: Feed = Crops(
            _open(cfg, data.train, data.num_sources, data.noise),
            seed=cfg.seed,
            crop_seconds=seconds,
        )
    elif data.noise != bool(data.mixing.get("noise")):
        raise ConfigError(
            f"data.noise={data.noise} with data.mixing.noise={data.mixing.get('noise')}: new mixtures have noise where "
            "a data set of noises is given; change one of them"
        )
    else:
        voices = _open(cfg, data.train, 1, False)
        options = {"num_sources": data.num_sources, "seed": cfg.seed, "crop_seconds": seconds}
        main = config.build(data.mixing, dataset=voices, **options)
    if data.interleave not in INTERLEAVES:
        raise ConfigError(
            f"data.interleave={data.interleave!r}: it is one of {', '.join(INTERLEAVES)}"
        )
    feeds: dict[str, Feed] = {MAIN: main}
    for one in data.extra:
        if one.name in feeds:
            raise ConfigError(
                f"data.extra: two data sets are named {one.name!r} ({MAIN!r} is that of data.train)"
            )
        if one.weight is not None and one.weight <= 0:
            raise ConfigError(
                f"data.extra: weight={one.weight} of {one.name!r}: it must be positive, or null"
            )
        seed = seeding.derive(cfg.seed, "data set", one.name)
        feeds[one.name] = Crops(
            _open(cfg, one.url, one.num_sources, one.noise), seed=seed, crop_seconds=seconds
        )
    return feeds, _open(cfg, data.validation, data.num_sources, data.noise)


def _open(cfg: TrainConfig, url: str, num_sources: int, noise: bool) -> Dataset:
    dataset = Dataset(
        url,
        num_sources=num_sources,
        noise=noise,
        cache_dir=cfg.data.cache_dir,
        cache_gigabytes=cfg.data.cache_gigabytes,
    )
    if dataset.manifest.sample_rate != cfg.sample_rate:
        raise ConfigError(
            f"{url} has {dataset.manifest.sample_rate} Hz, sample_rate={cfg.sample_rate}: shard it again at "
            f"{cfg.sample_rate} Hz, or set sample_rate"
        )
    return dataset
