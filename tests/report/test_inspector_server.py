"""The inspector's server, by real requests."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte.report import inspector_server
from lte.report.inspector import Inspector, NamedText, inspector_data
from lte.report.inspector_server import ADDRESS, MAX_BODY_BYTES, InspectorServer
from tests.report.inspected import NASTY, PLAIN, byte_level_tokenizer, sparse_model


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector(sparse_model(), byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer")), "tiny")


@pytest.fixture(scope="module")
def server(inspector: Inspector) -> Iterator[InspectorServer]:
    with InspectorServer(inspector, 0, [inspector.run(NamedText("first", PLAIN))]) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join(10)
        assert not thread.is_alive()


def ask(
    server: InspectorServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response, response.read()


def post(server: InspectorServer, content: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    response, answer = ask(server, "POST", "/inspect", body, **{"Content_Type": "application/json", **headers})
    return response.status, json.loads(answer)


def test_the_page_and_its_headers(server: InspectorServer) -> None:
    response, body = ask(server, "GET", "/")
    assert response.status == 200
    assert body == server.page
    assert b'"served":true' in body
    assert b"connect-src 'self'" in body
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"


def test_a_text_comes_back_as_the_data_of_the_page(server: InspectorServer, inspector: Inspector) -> None:
    status, answer = post(server, {"text": NASTY})
    assert status == 200
    assert answer == inspector_data([inspector.run(NamedText("your text", NASTY))], served=True)
    status, answer = post(server, {"text": PLAIN, "compare": NASTY})
    assert [run["text"] for run in answer["runs"]] == ["your text", "your second text"]


def test_a_text_is_continued_line_by_line(server: InspectorServer, inspector: Inspector) -> None:
    body = json.dumps({"text": "while"}).encode()
    response, answer = ask(server, "POST", "/generate", body, **{"Content_Type": "application/json"})
    assert (response.status, response.headers["Content-Type"]) == (200, "application/x-ndjson")
    *tokens, last = map(json.loads, answer.splitlines())
    expected = list(inspector.generate(NamedText("t", "while")))
    assert tokens == [{name: token[name] for name in ("entry", "share")} for token in expected]
    (run,) = last["runs"]
    assert run["text"] == "your text, continued"
    assert "".join(run["tokens"]).startswith("while")
    # Once more: the model is free again, and as it was.
    assert post(server, {"text": "while"})[0] == 200
    response, answer = ask(server, "POST", "/generate", b'{"text": ""}', **{"Content_Type": "application/json"})
    assert (response.status, json.loads(answer)["error"][:37]) == (400, "text must hold at least one token, go")


def test_a_client_that_leaves_while_the_model_writes_frees_it(server: InspectorServer) -> None:
    body = b'{"text": "while"}'
    with socket.create_connection((ADDRESS, server.server_port)) as client:
        client.sendall(head(server, len(body)).replace(b"/inspect", b"/generate") + body)
        assert client.recv(100)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert post(server, {"text": "a"})[0] == 200
    assert not server.busy.locked()


def test_it_listens_on_the_loopback_address_alone(server: InspectorServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_hosts_are_refused(host: str, method: str, server: InspectorServer) -> None:
    path, body = ("/", None) if method == "GET" else ("/inspect", b'{"text": "a"}')
    named = host.format(port=server.server_port)
    response, answer = ask(server, method, path, body, Host=named, **{"Content_Type": "application/json"})
    assert response.status == 403
    assert "Open this page as http://127.0.0.1" in json.loads(answer)["error"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1"])
def test_other_origins_are_refused(origin: str, server: InspectorServer) -> None:
    status, answer = post(server, {"text": "a"}, Origin=origin.format(port=server.server_port))
    assert (status, answer) == (403, {"error": "Texts are taken from this server's own page alone."})


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_its_own_page_is_answered(name: str, server: InspectorServer) -> None:
    at = f"{name}:{server.server_port}"
    assert post(server, {"text": "a"}, Host=at, Origin=f"http://{at}")[0] == 200


def test_forms_cannot_send_texts(server: InspectorServer) -> None:
    status, answer = post(server, {"text": "a"}, Content_Type="text/plain")
    assert (status, answer) == (415, {"error": "Texts must come as application/json."})


def test_the_size_is_limited_before_anything_is_read(server: InspectorServer) -> None:
    with socket.create_connection((ADDRESS, server.server_port), timeout=20) as client:
        head = f"POST /inspect HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        answer = client.recv(65536)
    assert b" 413 " in answer.split(b"\r\n")[0]
    status, answer = post(server, {"text": "a" * 4 * MAX_BODY_BYTES})
    assert (status, answer) == (413, {"error": "Texts must be at most 1,048,576 bytes together."})
    status, answer = post(server, b'{"text": "a"}', Content_Length="-1")
    assert (status, answer) == (411, {"error": "A request must say its length."})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "body must be JSON, got"),
        (b"\xff", "body must be JSON, got"),
        (b"[]", "body must be an object with the strings text and, if wanted, compare"),
        (b'{"text": 1}', "body must be an object with the strings"),
        (b'{"compare": "a"}', "body must be an object with the strings"),
        (b'{"text": "a", "more": "b"}', "body must be an object with the strings"),
        (b'{"text": ""}', "text must hold at least one token, got ''"),
        (b'{"text": "a\\ud800b"}', "text must be Unicode text, got half of a surrogate pair at character 1"),
        (b'{"text": "a", "compare": "\\udfff"}', "compare must be Unicode text"),
        (b"[" * 100_000, "body must be JSON, got maximum recursion depth"),
        (b'{"text": ' + b"9" * 5000 + b"}", "body must be JSON, got"),
    ],
)
def test_a_wrong_body_is_an_error_with_a_sentence(body: bytes, message: str, server: InspectorServer) -> None:
    status, answer = post(server, body)
    assert status == 400
    assert message in answer["error"]


def test_other_paths(server: InspectorServer) -> None:
    assert ask(server, "GET", "/etc/passwd")[0].status == 404
    assert ask(server, "POST", "/other", b"{}")[0].status == 404
    assert ask(server, "DELETE", "/")[0].status == 501


def test_a_port_that_is_taken(server: InspectorServer, inspector: Inspector) -> None:
    with pytest.raises(ValueError, match=f"port must be free, got port={server.server_port}: "):
        InspectorServer(inspector, server.server_port)
    with pytest.raises(ValueError, match="port must be free, got port=70000: "):
        InspectorServer(inspector, 70000)


def send(server: InspectorServer, request: bytes) -> bytes:
    """All that comes back for the bytes of a request."""
    with socket.create_connection((ADDRESS, server.server_port), timeout=20) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
    return answer


def head(server: InspectorServer, length: int) -> bytes:
    """The head of a request of the page."""
    lines = ("POST /inspect HTTP/1.1", f"Host: 127.0.0.1:{server.server_port}", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


LINES = st.binary(max_size=40).map(lambda line: line.replace(b"\n", b""))
REQUESTS = st.one_of(
    LINES.filter(lambda line: bool(line.strip())),
    st.builds(
        lambda method, path, version, headers, body: (
            b" ".join((method, path, version)) + b"\r\n" + b"".join(line + b"\r\n" for line in headers) + b"\r\n" + body
        ),
        st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"\xff", b"get"]),
        st.sampled_from([b"/", b"/inspect", b"//", b"*", b"/%00", b"/" + b"a" * 70_000]),
        st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"HTTP/x", b""]),
        st.lists(LINES | st.sampled_from([b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Host: localhost"])),
        st.binary(max_size=100),
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.text(st.characters(categories=["Cs"]), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "compare", "x"]), inner),
    max_leaves=5,
)
FUZZING = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZING
@given(request_bytes=REQUESTS)
def test_whatever_comes_gets_an_answer_with_a_status(server: InspectorServer, request_bytes: bytes) -> None:
    answer = send(server, request_bytes)
    assert answer.startswith(b"HTTP/1.0 "), (request_bytes, answer)
    assert answer.split()[1] in {b"200", b"400", b"403", b"404", b"405", b"411", b"414", b"415", b"431", b"501", b"505"}


@FUZZING
@given(content=JSON)
def test_whatever_json_comes_is_answered_in_json(server: InspectorServer, content: Any) -> None:
    body = json.dumps(content).encode()
    start, _, answer = send(server, head(server, len(body)) + body).partition(b"\r\n\r\n")
    status = int(start.split()[1])
    assert status in (200, 400), (content, start)
    assert set(json.loads(answer)) == ({"error"} if status == 400 else {"runs", "references", "pairs", "served"})


def test_clients_that_go_away_or_send_too_little(
    server: InspectorServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = b'{"text": "abc"}'
    for cut in (b"", b"PO", head(server, 5)[:-3], head(server, 50) + body, head(server, len(body)) + body):
        client = socket.create_connection((ADDRESS, server.server_port))
        client.sendall(cut)
        # Resets the connection, as a browser that is closed does.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert send(server, head(server, 50) + body).startswith(b"HTTP/1.0 408 ")
    assert send(server, head(server, 5) + body).startswith(b"HTTP/1.0 400 ")
    # Bytes that drip in do not hold a place for good.
    monkeypatch.setattr(inspector_server, "TIMEOUT_S", 0.5)
    start = time.monotonic()
    with socket.create_connection((ADDRESS, server.server_port), timeout=20) as client:
        client.sendall(head(server, 1000))
        client.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() < start + 10:
            client.sendall(b"x")
            try:
                answer = client.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.0 408 ")
    assert post(server, {"text": "a"})[0] == 200
    assert capfd.readouterr() == ("", "")


def test_too_many_clients_at_once_are_told(server: InspectorServer, capfd: pytest.CaptureFixture[str]) -> None:
    waiting = [socket.create_connection((ADDRESS, server.server_port)) for _ in range(inspector_server.MAX_CONNECTIONS)]
    try:
        deadline = time.monotonic() + 10
        while server.places._value and time.monotonic() < deadline:
            time.sleep(0.01)
        status = send(server, head(server, 0)).split(b"\r\n")[0]
        assert status == b"HTTP/1.0 503 Service Unavailable"
    finally:
        for client in waiting:
            client.close()
    while server.places._value != inspector_server.MAX_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert post(server, {"text": "a"})[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_model_that_fails_is_an_answer(server: InspectorServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: NamedText) -> dict[str, Any]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(server.inspector, "run", broken)
    assert post(server, {"text": "a"}) == (500, {"error": "The text failed with RuntimeError: no memory"})
