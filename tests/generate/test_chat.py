"""A model that one can talk to: templates, OpenAI's endpoints, streaming, and who may ask."""

import http.client
import json
import threading
import urllib.error
import urllib.request

import pytest

from megalm.__main__ import main
from megalm.config.errors import ConfigError
from megalm.generate.chat import Speaker
from megalm.generate.model import load_model, open_tokenizer
from megalm.generate.sampling import Sampling
from megalm.generate.server import ChatServer
from megalm.tokenizer.chat import ChatTemplate, check_messages, find_chat_template
from megalm.tokenizer.tokenizer import load_tokenizer
from tests.convert.architectures import transformers
from tests.convert.chat_model import FORMS, TALK, make_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "small-chat"
    folder.mkdir()
    make_chat_model(folder, "string")
    return folder


@pytest.fixture(scope="module")
def speaker(folder):
    source, model = load_model(folder)
    return Speaker(source, model, open_tokenizer(source))


@pytest.fixture(scope="module")
def server(speaker):
    server = ChatServer(speaker)
    server.start()
    yield server
    server.shutdown()
    server.server_close()


def post(server, path, headers=None, **body):
    request = urllib.request.Request(server.address + path, json.dumps(body).encode(), headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", [True, False])
def test_a_template_renders_as_transformers_does(form, answer, tmp_path):
    make_chat_model(tmp_path, form)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=answer
    )
    assert find_chat_template(load_tokenizer(tmp_path)).render(TALK, answer=answer) == expected


def test_prompts_are_transformers_ids(speaker, folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert speaker.prompt_of(TALK, 4) == expected


def test_without_a_template_it_is_a_transcript():
    plain = ChatTemplate(None)
    assert plain.render(TALK) == "User: what is it?\nAssistant: a test\nAssistant:" and "\nUser:" in plain.stop


def test_a_template_that_refuses_says_so():
    with pytest.raises(ConfigError, match="cannot render this conversation: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(TALK)


def test_a_template_cannot_reach_out():
    with pytest.raises(ConfigError, match="cannot render"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(TALK)


def test_a_long_conversation_loses_its_oldest_turns(speaker):
    said = [{"role": "system", "content": "be short"}]
    for n in range(12):
        said += [{"role": "user", "content": f"number {n}"}, {"role": "assistant", "content": "yes"}]
    said.append({"role": "user", "content": "last"})
    ids = speaker.prompt_of(said, 16)
    text = speaker.tokenizer.decode(ids)
    assert len(ids) <= speaker.window - 16 and "be short" in text and "last" in text and "number 0" not in text
    assert text.index("system") < text.index("user") < text.index("last")


@pytest.mark.parametrize("messages", [[], "hello", [{"role": "king", "content": "x"}], [{"role": "user"}]])
def test_messages_that_are_none(messages):
    with pytest.raises(ConfigError):
        check_messages(messages)


def test_the_endpoints_write_what_the_model_writes(server, speaker):
    asked = dict(max_tokens=8, temperature=0.9, seed=5)
    status, text = post(server, "/v1/chat/completions", messages=TALK[:1], **asked)
    answer = json.loads(text)
    expected = speaker.answer(TALK[:1], Sampling(8, 0.9, 0, 1.0, 5))
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "small-chat"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected.text.removeprefix(" ")}
    assert answer["usage"]["prompt_tokens"] == len(speaker.prompt_of(TALK[:1], 8))
    status, text = post(
        server, "/v1/completions", prompt=["the of", "to and"], n=2, logprobs=1, max_tokens=8, temperature=0
    )
    found = json.loads(text)["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    ids = speaker.encode("to and")
    (alone,) = speaker.write([ids], [Sampling(8, 0.0)])  # drawn, nearly equal logits would be told apart by rounding
    assert found[3]["text"] == alone.text
    assert found[3]["logprobs"]["token_logprobs"] == pytest.approx(alone.written.log_probabilities, abs=1e-4)


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_adds_up_to_the_answer(server, chat):
    asked = dict(max_tokens=12, temperature=0.9, seed=7)
    asked |= dict(messages=TALK[:1]) if chat else dict(prompt="the of")
    path = "/v1/chat/completions" if chat else "/v1/completions"
    whole = json.loads(post(server, path, **asked)[1])["choices"][0]
    lines = [line for line in post(server, path, stream=True, **asked)[1].split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    text = "".join(event["delta"].get("content", "") if chat else event["text"] for event in events)
    assert text == (whole["message"]["content"] if chat else whole["text"])
    assert events[-1]["finish_reason"] == whole["finish_reason"] and len(events) > 2


WRONG = [
    (dict(messages=[]), "messages must be a list"),
    (dict(messages=TALK, temperature=-1), "temperature is -1"),
    (dict(messages=TALK, top_p=3), "top-p=3.0"),
    (dict(messages=TALK, max_tokens=0), "max_tokens is 0"),
    (dict(messages=TALK, stop=[""]), "stop must be a text"),
    (dict(messages=TALK, tools=[{}]), "tools is not supported here"),
    (dict(messages=TALK, n=1000), "1000 texts are asked for; at most 128"),
]


@pytest.mark.parametrize("body,message", WRONG)
def test_a_wrong_request_is_answered_in_words(server, body, message):
    status, text = post(server, "/v1/chat/completions", **body)
    assert status == 400 and message in json.loads(text)["error"]["message"]


def test_token_ids_outside_the_vocabulary(server):
    status, text = post(server, "/v1/completions", prompt=[5, 999])
    assert status == 400 and "the prompt has the token 999" in text


def test_a_body_that_is_no_json(server):
    request = urllib.request.Request(server.address + "/v1/completions", b"{")
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    assert raised.value.code == 400


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_another_pages_request_is_refused(server, headers):
    status, text = post(server, "/v1/completions", headers, prompt="a")
    assert status == 403 and "its own page alone" in text


def test_it_listens_on_loopback_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=f"--port {server.server_address[1]}: cannot be listened on"):
        ChatServer(server.speaker, server.server_address[1])


def test_where_nobody_listens_any_more_the_model_stops(server):
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(host, port)
    body = json.dumps({"prompt": "the", "stream": True, "max_tokens": 100_000, "temperature": 1.5})
    connection.request("POST", "/v1/completions", body)
    reply = connection.getresponse()
    reply.read(20)
    reply.close()
    connection.close()
    done = threading.Event()
    threading.Thread(target=lambda: (post(server, "/v1/completions", prompt="a", max_tokens=1), done.set())).start()
    assert done.wait(60), "the next request waits for ever"


def test_the_terminal(folder, capsys, monkeypatch):
    lines = iter(["/again", "what is it?", "/again", "/system be short", "/clear", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", str(folder), "--max-tokens", "6", "--seed", "3"]) == 0
    shown = capsys.readouterr()
    assert "asked by its chat template" in shown.err and len(shown.out.splitlines()) >= 2


def test_wrong_settings_of_the_terminal(folder, capsys):
    assert main(["chat", str(folder), "--max-tokens", "0"]) == 2
    assert main(["chat", str(folder), "--top-p", "0"]) == 2
    assert "top-p=0.0 must be above 0" in capsys.readouterr().err
