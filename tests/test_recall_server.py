"""The tasks answered over HTTP, as by a vLLM server: lm-eval's `local-completions` asks a server of a tiny GPT-2."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from jrt_recall import fixtures, task_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = ["recall_squad", "recall_squad_twice"]
ITEMS = 3


@pytest.fixture
def server(tiny_gpt2):
    """An OpenAI-like /v1/completions: greedy, prompts as ids."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_gpt2), AutoTokenizer.from_pretrained(tiny_gpt2)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            choices = []
            for index, ids in enumerate(asked["prompt"]):
                prompt = torch.tensor([ids])
                with lock:
                    new = model.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=asked["max_tokens"],
                        do_sample=False,
                        pad_token_id=tokenizer.eos_token_id,
                    )[0, len(ids) :]
                text = tokenizer.decode(new, skip_special_tokens=True)
                for stop in asked["stop"]:
                    text = text.split(stop)[0]
                choices.append({"index": index, "text": text})
            body = json.dumps({"choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}/v1/completions"
    serving.shutdown()
    serving.server_close()


def test_a_server_gives_the_answers_of_hf(server, tiny_gpt2, shared, tmp_path, monkeypatch):
    pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    mirror = fixtures.write(tmp_path / "mirror", count=ITEMS, sentences=12)
    (mirror / "gpt2").symlink_to(shared / "gpt2")
    monkeypatch.setenv("JRT_DATA", str(mirror))
    over_http = {"model": str(tiny_gpt2), "base_url": server, "tokenizer_backend": "huggingface"}
    in_process = {"pretrained": str(tiny_gpt2), "device": "cpu", "dtype": "float32"}
    found = {}
    for kind, arguments in (("local-completions", over_http), ("hf", in_process)):
        metadata = {"pretrained": str(tiny_gpt2), "max_length": 2048}
        result = simple_evaluate(
            model=kind,
            model_args=arguments | {"max_length": 2048},
            tasks=TASKS,
            task_manager=TaskManager(include_path=str(task_folder()), include_defaults=False, metadata=metadata),
            bootstrap_iters=0,
        )
        found[kind] = {
            (task, sample["doc"]["id"]): sample["filtered_resps"][0].strip()
            for task in TASKS
            for sample in result["samples"][task]
        }
        assert result["results"]["recall_squad_twice"]["protocol,none"] == "jrt-table1 v1 (1000/50)"
    assert len(found["hf"]) == 2 * ITEMS and len(set(found["hf"].values())) > 2
    assert found["local-completions"] == found["hf"]
