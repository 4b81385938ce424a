"""What one rank does while the others wait: they hear of it all the time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from megatron_zeda.errors import ZedaError
from megatron_zeda.rollout import first_rank


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the first of two ranks broadcasts."""
    boxes: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, src: boxes.append(box[0]))
    monkeypatch.setattr(first_rank, "_HEARTBEAT_SECONDS", 0.001)
    return boxes


def test_the_others_hear_that_it_is_not_done_yet(told: list[Any]) -> None:
    def work() -> str:
        while len(told) < 3:  # for ever, if nobody is told meanwhile
            threading.Event().wait(0.001)
        return "done"

    assert first_rank.on_first(work) == "done"
    assert told[:3] == [None] * 3 and told[-1] == ("done", None)


def test_its_failure_is_everybodys(told: list[Any]) -> None:
    def work() -> None:
        raise ZedaError("no answer", where="http://localhost")

    with pytest.raises(ZedaError, match="no answer"):
        first_rank.on_first(work)
    assert str(told[-1][1]) == "http://localhost: no answer"


def test_a_result_of_nothing_is_one(told: list[Any]) -> None:
    assert first_rank.on_first(lambda: None) is None and told[-1] == (None, None)


def test_the_others_wait_for_it(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [None, None, ("theirs", None)]
    monkeypatch.setattr(dist, "get_rank", lambda: 1)

    def receive(box: list[Any], src: int) -> None:
        box[0] = answers.pop(0)

    monkeypatch.setattr(dist, "broadcast_object_list", receive)

    def mine() -> str:
        raise AssertionError("only the first rank works")

    assert first_rank.on_first(mine) == "theirs" and not answers
