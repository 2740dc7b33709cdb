"""The inspector's server, by real requests."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lte.report.inspector import Inspector, NamedText
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
    assert answer["runs"] == [inspector.run(NamedText("your text", NASTY))]
    status, answer = post(server, {"text": PLAIN, "compare": NASTY})
    assert [run["text"] for run in answer["runs"]] == ["your text", "your second text"]


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
