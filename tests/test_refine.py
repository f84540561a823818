"""Better prompts: by a real server that has its bad days, and by a tiny model in a folder."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import LanguageServer, better, language_server, make_language_model
from videofactory_train.evaluate import refine as refining
from videofactory_train.evaluate.refine import AT_ONCE, Refined, Refinement, read_refined, refine, summary

from videofactory_core import language
from videofactory_core.language import LONGEST_PROMPT, LocalModel, Server, refined

transformers = pytest.importorskip("transformers", "5.0")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LanguageServer]:
    monkeypatch.setattr(refining, "PATIENCE", 2.0)
    monkeypatch.setattr(refining, "ATTEMPTS", 1)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with language_server() as made:
        made.slowness = 6.0
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("models") / "tiny")


# Answers


@pytest.mark.parametrize(
    "answer",
    [
        "A dog runs.",
        ' "A dog\nruns."\n',
        "<think>They want a dog.\n\nA dog, then.</think>\n\nA dog runs.",
        "Sure, here is the prompt:\n\nA dog runs.",
    ],
)
def test_the_prompt_is_found_in_an_answer(answer: str) -> None:
    assert refined(answer) == "A dog runs."


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "is empty"),
        ("<think>done</think> ", "is empty"),
        ("1 2 ...", "has no words"),
        ("One.\n\nTwo.", "has 2 paragraphs"),
        ("Here:\n\nOne.\n\nTwo.", "has 2 paragraphs"),
        ("a" * (LONGEST_PROMPT + 1), "has 601 characters"),
        ("<html>Not found</html>", "is no sentence"),
        ("<think>what do they", "is no sentence"),
        ('{"error": "busy"}', "is no sentence"),
        ("I’m sorry, that I will not do.", "the model refuses"),  # noqa: RUF001
        ("As an AI, I see no dogs.", "the model refuses"),
    ],
)
def test_an_answer_without_a_prompt_is_named(answer: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        refined(answer)


def test_a_sentence_as_long_as_allowed_is_a_prompt() -> None:
    assert refined("é" * LONGEST_PROMPT) == "é" * LONGEST_PROMPT
    assert refined("Sorrow and a sorry dog.") == "Sorrow and a sorry dog."


# A server

WRONG = {
    "slow": "does not answer (timed out)",
    "closed": "does not answer",
    "out of memory": "does not answer (500",
    "wrong key": "refuses (401 Unauthorized",
    "a page": "no chat completion (Expecting value",
    "no choices": "no chat completion (list index",
    "a list": "no chat completion (list indices",
    "null": "no chat completion (its content is None)",
    "nothing": "the answer is empty",
    "numbers": "the answer has no words",
    "refusal": "the model refuses",
    "chapters": "has 2 paragraphs",
    "long": "has 999 characters",
    "code": "is no sentence",
    "endless thoughts": "is no sentence",
}


def test_what_a_server_does_wrong_leaves_the_prompt_and_is_counted(server: LanguageServer, tmp_path: Path) -> None:
    good = [f"a dog number {number}" for number in range(3 * AT_ONCE)]
    # Some that succeed among any eight.
    prompts = [text for group in zip(good, [*WRONG] * 2, strict=False) for text in group] + good
    asked = Refinement(server.address, "small")
    file = tmp_path / "refined.jsonl"
    found = refine(prompts, asked, file)
    assert [one.prompt for one in found] == prompts
    for one in found:
        if one.prompt in WRONG:
            assert one.better == ""
            assert WRONG[one.prompt] in one.reason
        else:
            assert one == Refined(one.prompt, better(one.prompt))
    assert len(server.asked) == len(set(prompts))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert {line["prompt"]: line["refined"] for line in lines} == {text: better(text) for text in good}
    said = summary(list(dict.fromkeys(found)), asked.by)
    assert said.startswith(f"{len(good)} of {len(good) + len(WRONG)} prompts refined by small, {len(WRONG)} stay")
    assert "2 because the answer is no sentence" not in said
    assert said.endswith("and so on)")

    # What went well is not asked for again.
    server.asked.clear()
    assert refine(["a dog number 1", "numbers", "a cat"], asked, file)[2].better == "A cat, seen from afar."
    assert sorted(server.asked) == ["a cat", "numbers"]
    assert read_refined(file)["a cat"] == "A cat, seen from afar."


def test_the_server_gets_instruction_and_prompt_and_the_key(
    server: LanguageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refine(["a dog"], Refinement(server.address, "small", "Better:"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    refine(["a dog"], Refinement(server.address + "/", "small"))
    first, second = (body["messages"][0]["content"][0]["text"] for body in server.bodies)
    assert first == "Better:\na dog"
    assert second == f"{language.INSTRUCTION}\na dog"
    assert [body["model"] for body in server.bodies] == ["small", "small"]
    assert server.keys == [None, "Bearer secret"]
    assert "secret" not in repr(Server(server.address, "small", "secret"))


def test_a_server_that_fails_every_prompt_is_asked_no_more(server: LanguageServer) -> None:
    prompts = [f"wrong key {number}" for number in range(10 * AT_ONCE)]
    found = refine(prompts, Refinement(server.address, "small"))
    assert sorted(server.asked) == sorted(prompts[:AT_ONCE])
    assert not any(one.better for one in found)
    assert "check refine_model and OPENAI_API_KEY" in found[0].reason
    assert found[-1].reason.startswith("it was not asked any more: http://")


def test_a_server_that_is_not_there_is_named(server: LanguageServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    (one,) = refine(["a dog"], Refinement(address, "small"))
    assert one.better == ""
    assert one.reason.startswith(f"{address} does not answer")
    assert summary([one], "small") == f"0 of 1 prompts refined by small, 1 stay as they were (1 because {one.reason})"


def test_a_broken_list_of_refined_prompts_is_named(server: LanguageServer, tmp_path: Path) -> None:
    file = tmp_path / "refined.jsonl"
    for content in ("[1]\n", '{"prompt": "a"}\n', "{\n"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"does not hold refined prompts .* delete it to ask again"):
            refine(["a dog"], Refinement(server.address, "small"), file)
    assert server.asked == []


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("http://localhost:1/v1", "", "has many models: name one of them"),
        ("nowhere", "", "there is no folder nowhere; name a folder with a language model, or a server"),
        ("", "", "no folder is named"),
    ],
)
def test_sources_that_cannot_be_asked_are_refused(source: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"refine_prompts: .*{message}"):
        Refinement(source, name)


# A folder


def test_a_model_in_a_folder_is_asked_without_a_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(refining, "MAX_TOKENS", 12)
    asked = Refinement(str(model), instruction="w8 w9")
    prompts = ["w10", "w11 w12 w13 w14 w15 w16", "w17 w18 w19"]
    found = refine(prompts, asked, tmp_path / "refined.jsonl", device="cpu")
    assert asked.by == "tiny"
    assert len({one.better for one in found}) == 3
    # Greedy, one by one, with the template written out.
    network = transformers.LlamaForCausalLM.from_pretrained(model).eval()
    for one in found:
        ids = [1, *(4 + int(word[1:]) for word in f"w2 w8 w9 {one.prompt} w3".split())]
        begun = len(ids)
        with torch.inference_mode():
            while len(ids) < begun + 12:
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        assert one.better == " ".join(f"w{number - 4}" for number in ids[begun:] if number >= 4)


def test_a_model_may_be_stopped_between_tokens(model: Path) -> None:
    calls = 0

    def watch() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    local = LocalModel("source", str(model), torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        local.ask(["w10"], 10, watch)
    assert calls == 3
    assert len(local.ask(["w10"], 10)[0].split()) <= 10


def test_what_a_folder_lacks_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"refine_model: .*tiny is a folder with one model; leave the name out"):
        Refinement(str(model), "small")
    shutil.copytree(model, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"refine_prompts: .*torn cannot be loaded"):
        refine(["w10"], Refinement(str(tmp_path / "torn")), device="cpu")
    (tmp_path / "torn" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"refine_prompts: .*torn has no weights"):
        Refinement(str(tmp_path / "torn"))
    # The module replaces itself when more of it is imported.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.44.2")
    with pytest.raises(ValueError, match=r"transformers is 4\.44\.2 and must be 4\.56 or newer: update it"):
        refine(["w10"], Refinement(str(model)), device="cpu")
