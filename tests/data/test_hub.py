"""Whether the hub can be reached is asked once, and never waited for long."""

import time

import pytest

from est_cli.data import hub


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.answers.cache_clear()
    yield
    hub.answers.cache_clear()


class Session:
    def __init__(self, head):
        self.head = head


def test_a_hub_that_answers_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.get_session", lambda: Session(lambda *_, timeout: asked.append(timeout)))
    assert (hub.answers(), hub.answers()) == (True, True)
    assert len(asked) == 1


def test_a_hub_that_refuses_or_hangs_does_not_answer(monkeypatch):
    def refuse(*_, timeout):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.get_session", lambda: Session(refuse))
    assert not hub.answers()
    hub.answers.cache_clear()
    monkeypatch.setattr(hub, "_TIMEOUT_S", 0.05)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: Session(lambda *_, timeout: time.sleep(3)))
    start = time.perf_counter()
    assert not hub.answers()
    assert time.perf_counter() - start < 2


def test_offline_mode_is_not_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked"))
    assert not hub.answers()
