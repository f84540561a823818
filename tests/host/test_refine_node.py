"""Refined prompts in the real host: a server of our own, a tiny model in its folder, and what goes wrong with them."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from comfy_server import Failed, Host
from graphs import PROMPT, Graph, node
from language_models import LanguageServer, better, language_server, make_language_model


@pytest.fixture
def server() -> Iterator[LanguageServer]:
    with language_server() as made:
        yield made


def refined(prompt: str = PROMPT, **settings: Any) -> Graph:
    inputs = {"source": "server", "server": "", "server_model": "small", "instruction": "Better:", **settings}
    return {
        "refine": node("VideoFactoryRefinePrompt", prompt=prompt, **inputs),
        "show": node("PreviewAny", source=["refine", 0]),
    }


def shown(host: Host, graph: Graph) -> str:
    """The prompt that comes out."""
    (text,) = host.run(graph)["show"]["text"]
    return str(text)


def test_a_server_refines_a_prompt_once(host: Host, server: LanguageServer) -> None:
    graph = refined("a dog on a hill", server=server.address)
    assert shown(host, graph) == better("a dog on a hill")
    assert server.bodies[0]["model"] == "small"
    assert server.bodies[0]["messages"][0]["content"] == [{"type": "text", "text": "Better:\na dog on a hill"}]
    # The host keeps what it has.
    host.run(graph)
    assert server.asked == ["a dog on a hill"]


def test_prompts_for_frames_are_refined_one_by_one(host: Host, server: LanguageServer) -> None:
    found = shown(host, refined('"0": "a dog", "8": "ein süßer Hund"', server=server.address))
    assert json.loads(f"{{{found}}}") == {"0": better("a dog"), "8": better("ein süßer Hund")}
    assert server.asked == ["a dog", "ein süßer Hund"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a page", "gave an answer that is no chat completion"),
        ("chapters", "the answer has 2 paragraphs"),
        ("wrong key", "check server_model and OPENAI_API_KEY"),
        ("closed", "does not answer"),
        ('"0": "a dog", "8": "nothing"', "the answer is empty"),
    ],
)
def test_what_fails_leaves_the_prompt_and_is_tried_again(
    host: Host, server: LanguageServer, prompt: str, reason: str
) -> None:
    said = host.log.read_text(errors="replace").count(reason)
    graph = refined(prompt, server=server.address)
    assert shown(host, graph) == prompt
    assert host.log.read_text(errors="replace").count(reason) == said + 1
    asked = len(server.asked)
    assert shown(host, graph) == prompt
    assert len(server.asked) > asked


# What the host calls text to be shown on a node.
TEXT = struct.pack(">I", 3)
HANDSHAKE = (
    "GET /ws?clientId=onlooker HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def test_the_node_shows_what_became_of_the_prompt(host: Host, server: LanguageServer) -> None:
    with socket.create_connection(("127.0.0.1", host.port), timeout=20) as browser:
        browser.sendall(HANDSHAKE.encode())
        received = b""
        for prompt, expected in (
            ("a dog on a lead", better("a dog on a lead")),
            ("a page of a book", f"The prompt stays as it is: {server.address} gave an answer that is no chat"),
        ):
            host.run(refined(prompt, server=server.address))
            while TEXT + struct.pack(">I", len("refine")) + b"refine" + expected.encode() not in received:
                found = browser.recv(1 << 16)
                assert found
                received += found


def test_the_key_of_the_environment_goes_to_no_server_that_a_graph_names(host: Host, server: LanguageServer) -> None:
    assert shown(host, refined("a dog and its key", server=server.address)) == better("a dog and its key")
    assert server.keys == [None]


def test_a_model_in_a_folder_refines_without_a_server(host: Host) -> None:
    names = {"LLM": "tiny", "text_encoders": "language/small"}
    for kind, name in names.items():
        make_language_model(host.base / "models" / kind / name)
    encoder = host.base / "models" / "text_encoders" / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"architectures": ["T5EncoderModel"]}')
    (host.base / "models" / "LLM" / "broken").mkdir()
    (host.base / "models" / "LLM" / "broken" / "config.json").write_text("[")
    info = host.get("object_info/VideoFactoryRefinePrompt")["VideoFactoryRefinePrompt"]
    kind, options = info["input"]["required"]["source"]
    offered = options.get("options", kind)
    assert offered == ["server", "LLM/tiny", "text_encoders/language/small"]
    first = shown(host, refined("w10 w11", source="LLM/tiny", instruction="w8"))
    other = shown(host, refined("w12", source="text_encoders/language/small", instruction="w8"))
    for words in (first, other):
        assert words
        assert set(words) <= set("w0123456789 ")
    assert first != other


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "no server is named: write its address"),
        ({"server": "localhost:11434"}, "no server is named: write its address"),
        ({"server": "http://127.0.0.1:9/v1", "server_model": " "}, "name one of them in server_model"),
        ({"source": "LLM/gone"}, "LLM/gone is not there any more"),
        ({"source": "LLM/../../secret"}, "is not there any more"),
    ],
)
def test_a_source_that_cannot_be_asked_is_refused(host: Host, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Failed, match=sentence):
        host.run(refined(**settings))
