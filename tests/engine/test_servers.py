"""Which server is asked, and for how long a request is tried again."""

from __future__ import annotations

import openai
import pytest

from lmcache_rag.engine.attempts import Attempts
from lmcache_rag.engine.calls import Answer
from lmcache_rag.engine.servers import Server, Servers
from lmcache_rag.errors import EngineError, PromptError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def servers(clock: Clock) -> Servers:
    return Servers(["a", "b", "c"], clock)


def taken(servers: Servers, text: str = "") -> Server:
    server = servers.take(text)
    assert isinstance(server, Server)
    return server


def test_what_is_new_goes_to_the_server_with_the_fewest_requests(servers: Servers) -> None:
    first = [taken(servers, str(number)).url for number in range(3)]
    assert sorted(first) == ["a", "b", "c"]
    servers.left(servers.all[1])
    assert taken(servers, "new").url == "b"


def test_a_conversation_stays_with_its_server(servers: Servers) -> None:
    taken(servers, "other")
    server = taken(servers, "Hello.")
    servers.answered(server, "Hello.")
    for _ in range(5):
        taken(servers, "more")
    assert taken(servers, "Hello. Hi! How are you?") is server
    assert taken(servers, "Hello, you.").running <= min(each.running for each in servers.all) + 1


def test_a_conversation_moves_on_where_its_server_fails(servers: Servers) -> None:
    server = taken(servers, "Hello.")
    servers.answered(server, "Hello.")
    servers.failed(taken(servers, "Hello. One."))
    assert taken(servers, "Hello. Two.") is not server


def test_a_failing_server_is_left_alone_ever_longer_and_an_answer_clears_it(clock: Clock) -> None:
    servers = Servers(["a"], clock)
    waits = []
    for _ in range(9):
        servers.failed(taken(servers))
        wait = servers.take("")
        assert isinstance(wait, float)
        waits.append(wait)
        clock.now += wait
    assert waits[:3] == pytest.approx([0.5, 1.0, 2.0])
    assert waits[-1] == pytest.approx(30.0)
    servers.answered(taken(servers), "")
    servers.failed(taken(servers))
    assert servers.take("") == pytest.approx(0.5)


def test_requests_that_were_under_way_together_fail_once(clock: Clock) -> None:
    servers = Servers(["a"], clock)
    together = [taken(servers) for _ in range(20)]
    for server in together:
        servers.failed(server)
    assert servers.take("") == pytest.approx(0.5) and not together[0].running


def test_a_server_that_never_comes_back_is_no_error_of_arithmetic(clock: Clock) -> None:
    servers = Servers(["a"], clock)
    for _ in range(2000):
        servers.failed(taken(servers))
        clock.now += 30.0
    assert isinstance(servers.take(""), Server)


def status_error(status: int, message: str = "so it is") -> openai.APIStatusError:
    library = __import__(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
    response = library.Response(status, request=library.Request("POST", "http://a"))
    return openai.APIStatusError(message, response=response, body={"message": message})


@pytest.mark.parametrize("error", [ConnectionError("cut"), status_error(500), status_error(429)])
def test_a_failure_is_tried_again_at_another_server(servers: Servers, clock: Clock, error: Exception) -> None:
    attempts = Attempts(servers, "", 10.0, clock)
    first = attempts.next()
    assert isinstance(first, Server)
    with attempts.at(first, Answer(0.0)):
        raise error
    second = attempts.next()
    assert isinstance(second, Server)
    assert second is not first
    with attempts.at(second, Answer(0.0)):
        pass
    assert attempts.done
    assert all(server.running == 0 for server in servers.all)


def test_patience_ends_with_the_last_failure(clock: Clock) -> None:
    attempts = Attempts(Servers(["a"], clock), "", 2.0, clock)
    waited = 0.0
    with pytest.raises(EngineError, match=r"No server answers at a \(cut\)"):
        while True:
            found = attempts.next()
            if isinstance(found, Server):
                with attempts.at(found):
                    raise ConnectionError("cut")
            else:
                waited += found
                clock.now += found
    assert waited == pytest.approx(2.0)


def test_what_was_handed_on_is_not_asked_for_again(servers: Servers, clock: Clock) -> None:
    attempts = Attempts(servers, "", 10.0, clock)
    server = attempts.next()
    assert isinstance(server, Server)
    with pytest.raises(EngineError, match="in the middle of an answer"), attempts.at(server, Answer(0.0, begun=True)):
        raise ConnectionError("cut")


@pytest.mark.parametrize(
    ("status", "answer", "kind", "advice"),
    [
        (400, Answer(0.0), PromptError, "refused the request"),
        (404, Answer(0.0), PromptError, "refused the request"),  # another model's name
        (404, None, EngineError, "is it `lmcache-rag serve`"),
        (401, Answer(0.0), EngineError, "LMCACHE_RAG_API_KEY"),
        (403, None, EngineError, "refused"),
    ],
)
def test_a_refusal_is_final_and_no_failure_of_the_server(
    servers: Servers, clock: Clock, status: int, answer: Answer | None, kind: type[Exception], advice: str
) -> None:
    attempts = Attempts(servers, "", 10.0, clock)
    server = attempts.next()
    assert isinstance(server, Server)
    with pytest.raises(kind, match="so it is") as refusal, attempts.at(server, answer):
        raise status_error(status)
    assert advice in str(refusal.value)
    assert (server.failures, server.running) == (0, 0)


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_what_is_not_the_servers_fault_is_not_held_against_it(
    servers: Servers, clock: Clock, error: BaseException
) -> None:
    attempts = Attempts(servers, "", 10.0, clock)
    server = attempts.next()
    assert isinstance(server, Server)
    with pytest.raises(type(error)), attempts.at(server):
        raise error
    assert (server.failures, server.running) == (0, 0)
