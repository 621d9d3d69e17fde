"""Dynamic mixing: different speakers, drawn levels and speeds, the same bits at any world size.

Each utterance is a tone of its own pitch, so a source shows which utterance it is, its speed and
its level.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sepdist import audio
from sepdist.data import shards
from sepdist.data.crops import Damage
from sepdist.data.members import DataError
from sepdist.data.records import Mixture
from sepdist.data.stream import TrainStream
from tests.support import toy
from tests.support.clips import (
    CROP,
    NUM_SPEAKERS,
    NUM_UTTERANCES,
    RATE,
    found_pitch,
    mixing,
    num_samples,
    pitch,
    rows,
    tone,
    utterances,
    write,
)
from tests.support.shard_sets import write_shard


def test_a_source_is_its_utterance_at_one_of_the_speeds_and_at_a_level_of_librimix(
    voices: str,
) -> None:
    made = mixing(voices, num_sources=3)
    speeds, levels = Counter[float](), []
    for position in range(60):
        item = made.item(position, [])
        assert list(item.members) == ["s1", "s2", "s3"] and item.id.endswith(f"@{position}")
        assert len({wave.size for wave in item.members.values()}) == 1
        for number, wave in zip(utterances(item), item.members.values(), strict=True):
            assert wave.dtype == np.float32
            speed = found_pitch(np.trim_zeros(wave)[:3000]) / pitch(number)
            nearest = min((0.95, 1.0, 1.05), key=lambda one: abs(one - speed))
            assert speed == pytest.approx(nearest, abs=3e-3)
            speeds[nearest] += 1
            length = min(CROP, round(num_samples(number) / nearest))
            assert not wave[length:].any() and np.abs(wave[length - 40 : length]).max() > 0
            levels.append(audio.loudness(wave[: min(length, 3400)], RATE))
    assert min(speeds.values()) > 40, "each of the three in a third of 180 draws"
    assert -33.3 < min(levels) < -32 and -26 < max(levels) < -24.7, (
        "U(-33, -25), and a little for another speed"
    )
    assert np.mean(levels) == pytest.approx(-29, abs=0.7)


def test_every_utterance_is_the_first_source_once_an_epoch_and_nobody_is_mixed_with_themselves(
    voices: str,
) -> None:
    made = mixing(voices, num_sources=3)
    assert made.num_samples == NUM_UTTERANCES
    epochs = []
    for epoch in range(3):
        items = [made.item(epoch * NUM_UTTERANCES + i, []) for i in range(NUM_UTTERANCES)]
        numbers = [utterances(item) for item in items]
        assert sorted(first for first, *_ in numbers) == list(range(NUM_UTTERANCES))
        for item, own in zip(items, numbers, strict=True):
            assert item.speakers == tuple(f"speaker{number % NUM_SPEAKERS}" for number in own)
            assert len(set(item.speakers)) == 3
        partners = Counter(number for _, *others in numbers for number in others)
        assert max(partners.values()) <= 8 and len(partners) > NUM_UTTERANCES / 2
        epochs.append(frozenset(tuple(own) for own in numbers))
    assert len(epochs[0] | epochs[1] | epochs[2]) > 2.5 * NUM_UTTERANCES, "other pairs every epoch"
    assert made.item(3, []).id != mixing(voices, num_sources=3, seed=4).item(3, []).id


def test_a_position_has_the_same_bits_in_any_world_at_any_cut_and_number_of_threads(
    voices: str, noises: str
) -> None:
    whole = rows(mixing(voices, noise=noises), 0, 1, 0, 6, 1)
    assert [position for position, *_ in whole] == list(range(48))
    found: list[tuple] = []
    for first, count, world_size in ((0, 2, 3), (2, 1, 1), (3, 3, 4)):
        for rank in range(world_size):
            found += rows(mixing(voices, noise=noises), rank, world_size, first, count, 2)
    assert sorted(found) == whole
    assert len({row[1] for row in whole}) == 48


def test_noise_is_extended_or_cut_to_the_mixture_and_at_a_level_of_its_own(
    voices: str, noises: str
) -> None:
    made, levels = mixing(voices, noise=noises), []
    for position in range(30):
        item = made.item(position, [])
        assert list(item.members) == ["s1", "s2", "noise"] and len(item.speakers) == 2
        noise = item.members["noise"]
        assert noise.size == item.members["s1"].size and np.abs(noise[-40:]).max() > 0
        levels.append(audio.loudness(noise, RATE))
    assert -39 < min(levels) < -36 and -32 < max(levels) < -29, "U(-38, -30), of the whole noise"
    spoken, noise = made.voices.dataset.manifest, shards.read_manifest(noises)
    assert made.digest() == f"{spoken.digest()} with {noise.digest()}"


def test_speakers_may_be_rare_but_two_are_needed(tmp_path: Path) -> None:
    skewed = mixing(
        write(tmp_path / "skewed", (7, 7), lambda number: "rare" if number == 9 else "usual")
    )
    for position in range(2 * NUM_UTTERANCES):
        assert sorted(skewed.item(position, []).speakers) == ["rare", "usual"]
    with pytest.raises(DataError, match=r"has 1 speakers.*s1 of 2 different speakers"):
        mixing(write(tmp_path / "one", (3,), lambda _: "usual"))


def test_librimixs_guards_hold_a_source_and_the_mixture_below_full_scale(tmp_path: Path) -> None:
    def click(number: int) -> np.ndarray:
        """Quiet, except for one sample in every 400."""
        wave = 0.001 * tone(number)
        wave[::400] = 0.9
        return wave

    quiet = mixing(write(tmp_path / "clicks", wave=click), speeds=[1.0], levels=(-5.0, -5.0))
    loud = mixing(write(tmp_path / "tones"), speeds=[1.0], levels=(-2.0, -2.0))
    for position in range(10):
        waves = quiet.item(position, []).members.values()  # each by itself would reach full scale
        assert all(0.89 < float(np.abs(wave).max()) <= 0.9 + 1e-6 for wave in waves)
        waves = loud.item(position, []).members.values()
        assert np.abs(sum(waves)).max() == pytest.approx(0.9, abs=1e-5)
        # Sources that would all reach full scale are as loud as each other.
        assert all(float(np.abs(wave).max()) == pytest.approx(0.45, abs=0.03) for wave in waves)


def test_a_damaged_utterance_gives_way_to_the_next_in_every_world_and_is_counted(
    tmp_path: Path,
) -> None:
    url = write(tmp_path)
    info = shards.read_manifest(url).shards[2]
    toy.damage(tmp_path / info.name, shards.read_index(url, info)[1], "s1")  # utterance 6
    damages: list[Damage] = []
    made = mixing(url)
    items = [made.item(position, damages) for position in range(2 * NUM_UTTERANCES)]
    assert all(6 not in utterances(item) for item in items)
    assert {damage.key for damage in damages} == {"u6"} and len(damages) >= 2
    whole = rows(mixing(url), 0, 1, 0, 3, 2)
    assert sorted(row for rank in range(3) for row in rows(mixing(url), rank, 3, 0, 3, 1)) == whole
    options = {"num_virtual_shards": 1, "micro_batch": NUM_UTTERANCES, "rank": 0, "world_size": 1}
    stream = TrainStream({"main": mixing(url)}, seed=3, **options)
    with pytest.raises(DataError, match=r"u6\.s1 at byte .*data\.max_damaged=0 are allowed"):
        next(stream.steps(0))
    stream.close()


def test_an_utterance_that_has_no_loudness_is_named(tmp_path: Path) -> None:
    made = mixing(write(tmp_path, (3,), wave=lambda number: tone(number)[:2000]))
    with pytest.raises(DataError, match=r"u\d: lasts 0\.25 s, shorter than the 0\.4 s"):
        made.item(0, [])


def test_what_cannot_be_mixed_is_refused(voices: str, tmp_path: Path) -> None:
    toy.write(tmp_path / "mixtures", (3,))
    with pytest.raises(ValueError, match=r"speeds=\[0\]"):
        mixing(voices, speeds=[0])
    with pytest.raises(DataError, match=r"has the members s1, s2, noise.*a data set of s1 alone"):
        mixing(voices, noise=str(tmp_path / "mixtures"))
    toy.write(tmp_path / "unknown", (3,), names=("mix",))
    with pytest.raises(DataError, match="the members mix; mixing needs s1"):
        mixing(str(tmp_path / "unknown"))


def test_the_first_sources_of_mixtures_can_be_mixed_anew(tmp_path: Path) -> None:
    def members(number: int) -> dict[str, np.ndarray]:
        return {"s1": tone(number), "s2": 0.1 * tone(number)}

    records = [Mixture(f"u{n}", (f"a{n}", "b"), RATE, partial(members, n)) for n in range(4)]
    info = write_shard(records, tmp_path, shards.shard_name("toy", "train", 0))
    shards.write_manifest(tmp_path, "toy", "train", RATE, [info])
    item = mixing(str(tmp_path), speeds=[1]).item(0, [])
    assert item.speakers == tuple(f"a{number}" for number in utterances(item))
    for number, wave in zip(utterances(item), item.members.values(), strict=True):
        assert found_pitch(np.trim_zeros(wave)[:3000]) == pytest.approx(pitch(number), abs=2)


def lopsided(number: int) -> str:
    """Of 14 utterances, 10 are of one speaker, and 1 or 2 of each of three others."""
    return "most" if number < 10 else f"other{number % 3}"


def test_balanced_speakers_are_drawn_alike_and_so_are_the_utterances_of_each(
    tmp_path: Path,
) -> None:
    """Shares by an independent count: 4 speakers, so each is in half of the mixtures of two."""
    made = mixing(write(tmp_path, speaker=lopsided), balance="speaker", speeds=[1.0])
    place, firsts, seconds, own = Counter[str](), Counter[str](), Counter[str](), Counter[int]()
    num_draws = 1500
    for position in range(num_draws):
        # The choice alone: an item would cost a second of audio more.
        clips = [made.voices.find(order, position, set(), []) for order in made.voices.orders[:1]]
        clips.append(made.voices.find(made.voices.orders[1], position, {clips[0].speaker}, []))
        names = [clip.speaker for clip in clips]
        assert len(set(names)) == 2
        place.update(names)
        firsts[names[0]] += 1
        seconds[names[1]] += 1
        own.update(int(clip.key[1:]) for clip in clips if clip.speaker == "most")
    for counts, share in ((firsts, 1 / 4), (seconds, 1 / 4), (place, 1 / 2)):
        assert len(counts) == 4
        for count in counts.values():
            spread = 4 * (num_draws * share * (1 - share)) ** 0.5
            assert count == pytest.approx(num_draws * share, abs=spread)
    assert sorted(own) == list(range(10)) and min(own.values()) > place["most"] / 20
    usual = mixing(str(tmp_path))
    drawn = [usual.voices.find(usual.voices.orders[0], at, set(), []).speaker for at in range(140)]
    assert drawn.count("most") == 100, "by default, as often as there are utterances"


def test_balanced_mixtures_have_the_same_bits_in_any_world_and_go_on_where_they_stopped(
    tmp_path: Path,
) -> None:
    url = write(tmp_path, speaker=lopsided)
    whole = rows(mixing(url, balance="speaker"), 0, 1, 0, 4, 1)
    found: list[tuple] = []
    for first, count, world_size in ((0, 1, 3), (1, 3, 2)):
        for rank in range(world_size):
            found += rows(mixing(url, balance="speaker"), rank, world_size, first, count, 2)
    assert sorted(found) == whole
    assert len({row[2] for row in whole}) == len(whole), "no two mixtures are equal"


def test_a_rank_reads_ahead_the_shards_that_its_own_positions_draw(tmp_path: Path) -> None:
    made = mixing(write(tmp_path, (2,) * 7, speaker=lopsided), balance="speaker")
    stream = TrainStream(
        {"main": made}, seed=3, num_virtual_shards=4, micro_batch=2, rank=1, world_size=4
    )
    order = made.voices.orders[0]
    drawn = [
        next(order.candidates(at))[0] for step in (0, 1) for at in (8 * step + 2, 8 * step + 3)
    ]
    assert order.upcoming(range(16), range(1, 2)) == list(dict.fromkeys(drawn))
    stream.close()


def test_balance_is_one_of_two_words_and_a_damaged_utterance_is_drawn_again(
    tmp_path: Path,
) -> None:
    url = write(tmp_path, speaker=lopsided)
    with pytest.raises(ValueError, match="balance=time: give speaker, or null for none"):
        mixing(url, balance="time")
    info = shards.read_manifest(url).shards[0]
    toy.damage(tmp_path / info.name, shards.read_index(url, info)[1], "s1")  # utterance 1 of "most"
    made, damages = mixing(url, balance="speaker"), list[Damage]()
    items = [made.item(position, damages) for position in range(60)]
    assert all(1 not in utterances(item) for item in items)
    assert {damage.key for damage in damages} == {"u1"}
