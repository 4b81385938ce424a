"""New weights for a server: exported from Megatron chunks, loaded by a real local server, or loudly not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_megatron, megatron_model, newest_iteration
from completions_server import CompletionsServer, serving, transformers_completions
from tiny_hf import VOCABULARY

from megatron_zeda.conversion import hf_to_megatron
from megatron_zeda.errors import ZedaError
from megatron_zeda.models import load_hf_config
from megatron_zeda.rollout import Codec, Request, Sampling, weight_sync
from megatron_zeda.rollout.hf_folder import load_model, read_config
from megatron_zeda.rollout.megatron_engine import MegatronEngine
from megatron_zeda.rollout.openai_engine import OpenAIEngine
from megatron_zeda.rollout.weight_sync import WeightSync, export_weights

GREEDY = Sampling(max_new_tokens=5, temperature=0.0)
REQUESTS = [Request([7, 20, 31], 0), Request([9, 40], 1)]


@pytest.fixture(scope="module")
def imported(tiny_dynamic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sync") / "megatron"
    hf_to_megatron(tiny_dynamic, folder)
    return folder


@pytest.fixture
def server(tiny_dynamic: Path) -> Iterator[CompletionsServer]:
    """It serves whatever it was told to load last."""
    loaded: dict[str, Any] = {"first": transformers_completions(load_model(tiny_dynamic, device=torch.device("cpu")))}

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        if running.loaded not in loaded:
            model = load_model(Path(running.loaded), device=torch.device("cpu"))
            loaded[running.loaded] = transformers_completions(model)
        return loaded[running.loaded](body)

    with serving(complete) as running:
        yield running


def connect(server: CompletionsServer, folder: Path) -> OpenAIEngine:
    codec = Codec(folder, read_config(folder))
    return OpenAIEngine(server.url, codec, vocab_size=len(VOCABULARY), retry_seconds=0.0, max_retries=1)


@pytest.mark.parametrize(("reload", "format"), [("vllm", "dense-zeros"), ("sglang", "zeda")])
def test_the_server_says_what_the_new_weights_say(
    megatron: None,
    tmp_path: Path,
    tiny_dynamic: Path,
    imported: Path,
    server: CompletionsServer,
    reload: Any,
    format: str,
) -> None:
    model = megatron_model(load_hf_config(tiny_dynamic), perform_initialization=False)
    load_megatron(model, newest_iteration(imported))
    engine = connect(server, tiny_dynamic)
    (tmp_path / "versions" / "9").mkdir(parents=True)  # of a run that was killed
    sync = WeightSync(
        tmp_path / "versions",
        engine,
        lambda folder: export_weights([model], folder, hf=tiny_dynamic, format=format),
        reload=reload,
    )
    assert engine.weights_version is None and not list((tmp_path / "versions").iterdir())
    said = []
    for version in (3, 4, 4, 6):
        with torch.no_grad():
            model.output_layer.weight.mul_(-1.0)
        before = len(server.posts)
        sync(version)
        assert (len(server.posts) == before) == (version == 4 and len(said) == 2)  # it has them: nothing to do
        if len(server.posts) == before:
            with torch.no_grad():
                model.output_layer.weight.mul_(-1.0)
        found = engine.generate(REQUESTS, GREEDY)
        wanted = MegatronEngine([model], eos_ids=engine.codec.eos_ids, context=96).generate(REQUESTS, GREEDY)
        assert [response.ids for response in found] == [response.ids for response in wanted]
        assert {response.weights_version for response in found} == {version}
        said.append([response.ids for response in found])
    assert said[0] != said[1] == said[2] != said[3]
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["4", "6"]
    assert server.loaded == str((tmp_path / "versions" / "6").resolve())


@pytest.mark.parametrize("busy", [1, 1000])
def test_vllm_forgets_the_prefixes_of_the_old_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: CompletionsServer, busy: int
) -> None:
    """It keeps them, with HTTP 200, while a request holds any."""
    monkeypatch.setattr(weight_sync, "_FORGET_WAITS", (0.0, 0.0))
    server.busy = busy
    weight_sync.load_weights(server.url, tmp_path, "vllm")
    wanted = ["", ""] if busy == 1 else ["", "", "?reset_running_requests=true"]
    assert [path for path, _ in server.posts] == ["/collective_rpc", *(f"/reset_prefix_cache{w}" for w in wanted)]


def test_prefixes_that_stay_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: CompletionsServer
) -> None:
    monkeypatch.setattr(weight_sync, "_FORGET_WAITS", (0.0,))
    monkeypatch.setattr(weight_sync, "send_json", lambda *request: {"success": False})
    with pytest.raises(ZedaError, match="keeps what it computed with the old weights"):
        weight_sync.load_weights(server.url, tmp_path, "vllm")


def test_weights_that_did_not_arrive_have_no_number(
    tmp_path: Path, tiny_dynamic: Path, server: CompletionsServer
) -> None:
    engine = connect(server, tiny_dynamic)

    def nothing(folder: Path) -> None:
        folder.mkdir()

    sync = WeightSync(tmp_path / "versions", engine, nothing, reload="sglang")
    server.shutdown()
    server.server_close()
    with pytest.raises(ZedaError, match="the server did not get the weights of step 2"):
        sync(2)
    assert engine.weights_version is None


def test_a_server_that_is_never_told_keeps_its_first_version(
    tmp_path: Path, tiny_dynamic: Path, server: CompletionsServer
) -> None:
    engine = connect(server, tiny_dynamic)
    sync = WeightSync(tmp_path / "versions", engine, lambda folder: None, reload=None)
    sync(5)
    assert engine.weights_version == 0 and not server.posts[1:]
    assert not (tmp_path / "versions").exists()
