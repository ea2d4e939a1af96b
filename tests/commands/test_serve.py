"""`headwise serve` and `transformers serve`, as OpenAI's client sees them."""

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch

from headwise import MoHConfig, cli, convert, load
from headwise.hf import batching
from headwise.hf.batching import IS_SUPPORTED
from tiny import LINES, llama, tokenizer

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
SECONDS = 120


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "model"
    words = tokenizer(LINES)
    words.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    dense = llama(vocab_size=len(words), eos_token_id=None, pad_token_id=0).eval()
    attention = MoHConfig(router="query_norm", shared=2, active=4)
    convert(dense, attention=attention).save_pretrained(path)
    words.save_pretrained(path)
    return path


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(*command):
    """A client of what the command serves, once it answers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for _ in range(SECONDS):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, process.stdout.read()
                time.sleep(1)
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=SECONDS
        )
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)


def written(directory, prompt, tokens):
    model, words = load(directory), tokenizer(LINES)
    ids = words(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        new = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return words.decode(new)


OURS = ("-m", "headwise", "serve")
# In a process that never imports headwise but by the module beside the weights.
THEIRS = (
    "-c",
    "from transformers.cli.transformers import main; main()",
    "serve",
    "--trust-remote-code",
    "--continuous-batching",
    "--no-cb-use-cuda-graph",
    "--cb-num-blocks=16",
)


@pytest.mark.skipif(not IS_SUPPORTED, reason="transformers is too old")
@pytest.mark.works_with("openai", "a client of `headwise serve` and `transformers serve`")
@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["headwise", "transformers"])
def test_a_client_of_openai_gets_what_generate_writes(directory, command):
    with served(*command, directory) as client:
        options = {"model": str(directory), "max_tokens": 7, "temperature": 0}
        prompts = ["line 3", "line 17 and a longer prompt", "l"]
        for prompt in prompts:
            expected = written(directory, prompt, 7)
            assert client.completions.create(prompt=prompt, **options).choices[0].text == expected
            chat = client.chat.completions.create(
                messages=[{"role": "user", "content": prompt}], **options
            )
            assert chat.choices[0].message.content == expected
        assert client.models.list().object == "list"


@pytest.mark.skipif(not IS_SUPPORTED, reason="transformers is too old")
@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_a_model_that_cannot_chat_says_so_as_it_starts(
    directory, tmp_path, monkeypatch, capsys, template
):
    from transformers.cli import serve

    words = tokenizer(LINES)
    words.chat_template = template
    load(directory).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    monkeypatch.setattr(serve, "Serve", lambda **_: None)  # which would not end
    cli.main(["serve", str(tmp_path)])
    assert ("no chat template" in capsys.readouterr().out) == (template is None)


def test_transformers_that_cannot_batch_routed_heads_is_refused(directory, monkeypatch, fails):
    monkeypatch.setattr(batching, "IS_SUPPORTED", False)
    assert "continuous batching cannot use routed heads; 5.23 can" in fails(2, "serve", directory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such"], "holds no model"),
        (["{model}", "--port", "70000"], "port is 70000; it must be at most 65535"),
        (["{model}", "--port", "0"], "port is 0; it must be at least 1"),
        (["{bare}"], "has no tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused(directory, tmp_path, capsys, arguments, message):
    bare = tmp_path / "bare"
    load(directory).save_pretrained(bare)
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *(a.format(model=directory, bare=bare) for a in arguments)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
