"""What is said where Ray does not answer, or has less room than was asked for."""

import itertools
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import worker

from sepdist.cluster import check_room, connected, run_tasks
from sepdist.config import ConfigError

FOUR_CPUS = {"CPU": 4.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 2.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to be connected to a Ray of these nodes, started here or elsewhere."""

    def pretend(*nodes: dict[str, float], here: bool = False) -> None:
        listed = [{"Alive": True, "Resources": one} for one in nodes]
        listed.append({"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}})
        monkeypatch.setattr(ray, "nodes", lambda: listed)
        monkeypatch.setattr(worker, "_global_node", SimpleNamespace(is_head=lambda: here))

    return pretend


@pytest.mark.parametrize(
    ("nodes", "each", "room"),
    [
        ([FOUR_CPUS], {"CPU": 1.0}, 4),
        ([FOUR_CPUS, FOUR_CPUS], {"CPU": 3.0}, 2),  # a worker has its CPUs on one node
        ([FOUR_CPUS], {"CPU": 0.1}, 40),  # not 39, as 4 // 0.1 is
        ([FOUR_CPUS, GPU_NODE], {"CPU": 1.0, "GPU": 1.0}, 2),
        ([GPU_NODE], {"CPU": 8.0, "GPU": 1.0}, 1),
        ([GPU_NODE], {"CPU": 1.0, "GPU": 0.0}, 8),
        ([], {"CPU": 1.0}, 0),
    ],
)
def test_there_is_room_for_the_workers_that_fit_on_single_nodes(cluster, nodes, each, room) -> None:
    cluster(*nodes)
    assert check_room(0, each, "") == room


@pytest.mark.parametrize(
    ("nodes", "each", "says"),
    [
        ([FOUR_CPUS], {"CPU": 1.0}, r"needs 1 CPU; Ray has 4 CPU on 1 .* room for 4 of 16"),
        ([FOUR_CPUS], {"CPU": 8.0}, r"needs 8 CPU; .* room for 0 of 16"),
        (
            [FOUR_CPUS, GPU_NODE],
            {"CPU": 1.0, "GPU": 1.0},
            r"has 12 CPU, 2 GPU on 2 .* room for 2 of",
        ),
        ([], {"CPU": 1.0}, r"has 0 CPU on 0 .* room for 0 of 16"),
    ],
)
def test_too_little_room_is_an_error_in_a_ray_started_here_and_said_of_one_that_may_grow(
    cluster, caplog, nodes, each, says
) -> None:
    cluster(*nodes, here=True)
    with pytest.raises(ConfigError, match=f"cluster.num_workers=16: .*{says}") as error:
        check_room(16, each, "cluster.num_workers=16")
    assert "\n" not in str(error.value)
    cluster(*nodes)
    check_room(16, each, "cluster.num_workers=16")
    [record] = caplog.records
    assert record.message.startswith(str(error.value)) and "waiting" in record.message


def test_enough_room_is_not_worth_a_word(cluster, caplog) -> None:
    cluster(FOUR_CPUS, here=True)
    check_room(4, {"CPU": 1.0}, "cluster.num_workers=4")
    assert not caplog.records


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `ray.init` fail with these errors, then succeed; returns how often it was called."""
    calls: list[dict[str, Any]] = []

    def fail(*errors: Exception) -> list[dict[str, Any]]:
        waiting = iter(errors)

        def init(**options: Any) -> None:
            calls.append(options)
            for error in itertools.islice(waiting, 1):
                raise error

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: calls.append({"shutdown": True}))
        return calls

    return fail


TIMED_OUT = Exception("The current node timed out during startup. This\ncould happen because ...")


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
@pytest.mark.parametrize(
    "error", [TIMED_OUT, RuntimeError("a raylet\ndied"), ConnectionError("refused"), ValueError()]
)
def test_a_ray_that_does_not_answer_is_asked_again(
    attempts, caplog, address, error, monkeypatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    calls = attempts(error)
    with connected(2, address=address):
        asked = list(calls)
    assert [call.get("address") for call in asked] == [address or "local", None, address or "local"]
    [record] = caplog.records
    assert "trying again" in record.message and "\n" not in record.message


@pytest.mark.parametrize("error", [TIMED_OUT, RuntimeError("no raylet"), PermissionError("tmp")])
def test_a_ray_that_never_answers_is_an_error_of_one_line(attempts, error, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    attempts(error, error, error)
    says = r"Ray at '10.0.0.1:6379' did not answer: "
    with pytest.raises(OSError, match=says) as raised, connected(2):
        pass
    assert "\n" not in str(raised.value) and str(error).split()[0] in str(raised.value)


def test_an_interruption_while_ray_starts_is_not_an_answer(attempts) -> None:
    attempts(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), connected(2):
        pass


def count(upto: int) -> Iterator[int]:
    yield from range(upto)


@pytest.mark.slow
def test_tasks_that_no_node_can_take_are_refused_and_more_than_fit_take_turns(caplog) -> None:
    with connected(2):
        with pytest.raises(ConfigError, match=r"num_workers=2: each worker needs 1 CPU, 64 GPU"):
            list(run_tasks(count, [(2,)], 2, num_gpus=64.0))
        room = int(ray.cluster_resources()["CPU"])
        with caplog.at_level(logging.WARNING):
            assert sorted(run_tasks(count, [(2,)] * 9, room + 3)) == sorted([0, 1] * 9)
        assert f"num_workers={room + 3}: this Ray runs {room} of them at a time" in caplog.text
