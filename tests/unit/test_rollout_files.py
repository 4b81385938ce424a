"""The jsonl formats: what is read, what is refused and where, and how an interrupted output goes on."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_hf import write_lines

from megatron_zeda.data.jsonl import read_lines
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.rollout.files import Expected, Rollout, RolloutWriter, read_prompts, read_rollouts

ROLLOUT = Rollout(
    id="a",
    messages=[{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ho"}],
    prompt_ids=[3, 4],
    response_ids=[5, 1],
    logprobs=[-0.5, -0.25],
    finish_reason="stop",
    sampling={"temperature": 0.0, "sample": 0},
    engine="transformers",
    weights_version="sha256:0",
)


def test_prompts_of_both_forms_are_read_with_their_answers(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2+2?"}]
    path = write_lines(
        tmp_path / "p.jsonl",
        [{"prompt": messages, "id": "x", "answer": "4", "task": "add", "source": "ignored"}, {"prompt": "plain"}],
    )
    first, second = read_prompts(path)
    assert (first.id, first.content, first.answer, first.task) == ("x", messages, "4", "add")
    assert first.messages == messages
    assert (second.id, second.content, second.answer, second.task) == (1, "plain", None, None)
    assert second.messages == [{"role": "user", "content": "plain"}]
    assert second.where == f"{path}:2"


def test_a_rollout_survives_the_file(tmp_path: Path) -> None:
    checkable = replace(ROLLOUT, id=3, answer="ho", task="echo", logprobs=None)
    path = tmp_path / "r.jsonl"
    path.write_text(f"{ROLLOUT.to_json()}\n{checkable.to_json()}\n", encoding="utf-8")
    assert read_rollouts(path) == [ROLLOUT, checkable]
    assert "answer" not in json.loads(ROLLOUT.to_json())


GOOD_PROMPT = {"prompt": "hello"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "empty line"),
        ('{"prompt": "a"', "malformed JSON"),
        ("[1]", "not a JSON object"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no `prompt`"),
        ('{"prompt": []}', "at least one message"),
        ('{"prompt": ""}', "list of messages or a text"),
        ('{"prompt": 7}', "list of messages or a text"),
        ('{"prompt": [{"role": "user"}]}', "message 0 has no text in `content`"),
        ('{"prompt": ["hi"]}', "message 0 has no text in `role`"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', "ends with an assistant message"),
        ('{"prompt": "a", "answer": 4}', "`answer` must be a text"),
        ('{"prompt": "a", "id": 1.5}', "`id` must be"),
        ('{"prompt": "a", "id": 0}', "used before"),
    ],
)
def test_a_bad_prompt_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(GOOD_PROMPT)}\n{line}\n")
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "`id` must be"),
        ({"prompt_ids": []}, "`prompt_ids` must be a list of at least one"),
        ({"response_ids": [1, -2]}, "`response_ids`"),
        ({"response_ids": [True]}, "`response_ids`"),
        ({"logprobs": [-0.5]}, "one number per response token"),
        ({"finish_reason": "eos"}, "unknown `finish_reason`"),
        ({"sampling": []}, "`sampling` must be an object"),
        ({"engine": 3}, "`engine` must be a text"),
        ({"messages": []}, "`messages` must be a list"),
    ],
)
def test_a_bad_rollout_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", [json.loads(ROLLOUT.to_json()) | change])
    with pytest.raises(InputError, match=message) as caught:
        read_rollouts(path)
    assert str(caught.value).startswith(f"{path}:1")


@pytest.mark.parametrize("key", [k for k in json.loads(ROLLOUT.to_json()) if k != "logprobs"])
def test_a_missing_key_of_a_rollout_is_named(tmp_path: Path, key: str) -> None:
    line = json.loads(ROLLOUT.to_json())
    del line[key]
    with pytest.raises(InputError, match=f"r.jsonl:1: missing `{key}`"):
        read_rollouts(write_lines(tmp_path / "r.jsonl", [line]))


def test_files_that_are_not_jsonl_are_refused(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.touch()
    binary.write_bytes(b"\x80\x81\n")
    for path, message in ((empty, "the file is empty"), (binary, "not UTF-8"), (tmp_path / "absent", "no such file")):
        with pytest.raises(InputError, match=message):
            list(read_lines(path))


def writer_for(output: Path, rollouts: list[Rollout]) -> RolloutWriter:
    expected = [Expected(r.id, r.prompt_ids, r.sampling) for r in rollouts]
    return RolloutWriter(output, expected, engine=ROLLOUT.engine, weights_version=ROLLOUT.weights_version)


@pytest.fixture
def three() -> list[Rollout]:
    return [replace(ROLLOUT, id=i, prompt_ids=[3, i + 4]) for i in range(3)]


def test_a_finished_output_appears_at_once_and_is_complete(tmp_path: Path, three: list[Rollout]) -> None:
    output = tmp_path / "new" / "r.jsonl"
    with writer_for(output, three) as writer:
        writer.write(three[:2])
        assert not output.exists()
        assert len((tmp_path / "new" / "r.jsonl.partial").read_text().splitlines()) == 2
        writer.write(three[2:])
    assert read_rollouts(output) == three
    assert [path.name for path in output.parent.iterdir()] == ["r.jsonl"]
    again = writer_for(output, three)
    assert again.complete


@pytest.mark.parametrize("torn", ["", '{"id": 2, "mess', '{"id": "\\u00'])
@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.partial"])
def test_an_interrupted_output_goes_on_after_its_last_complete_line(
    tmp_path: Path, three: list[Rollout], torn: str, name: str
) -> None:
    output = tmp_path / "r.jsonl"
    (tmp_path / name).write_text(f"{three[0].to_json()}\n{three[1].to_json()}\n{torn}", encoding="utf-8")
    writer = writer_for(output, three)
    assert writer.num_done == 2
    with writer:
        writer.write(three[2:])
    assert read_rollouts(output) == three


def test_a_line_torn_inside_a_character_is_cut(tmp_path: Path, three: list[Rollout]) -> None:
    output = tmp_path / "r.jsonl"
    line = three[1].to_json().encode()
    (tmp_path / "r.jsonl.partial").write_bytes(
        three[0].to_json().encode() + b"\n" + line[: line.index("é".encode()) + 1]
    )
    with writer_for(output, three) as writer:
        assert writer.num_done == 1
        writer.write(three[1:])
    assert read_rollouts(output) == three


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": {"temperature": 1.0, "sample": 0}}, "another `sampling`"),
        ({"engine": "vllm"}, "another `engine`"),
        ({"weights_version": "sha256:1"}, "another `weights_version`"),
        ({"prompt_ids": [9]}, "another `prompt_ids`"),
        ({"id": "other"}, "another `id`"),
    ],
)
def test_an_output_made_with_other_settings_is_refused_and_kept(
    tmp_path: Path, three: list[Rollout], change: dict[str, Any], message: str
) -> None:
    output = tmp_path / "r.jsonl"
    content = f"{three[0].to_json()}\n{replace(three[1], **change).to_json()}\n"
    output.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=f"r.jsonl:2: the file was made with {message}"):
        writer_for(output, three)
    assert output.read_text(encoding="utf-8") == content


def test_an_output_with_more_lines_or_two_states_is_refused(tmp_path: Path, three: list[Rollout]) -> None:
    output = tmp_path / "r.jsonl"
    output.write_text("".join(f"{r.to_json()}\n" for r in three), encoding="utf-8")
    with pytest.raises(InputError, match="more lines"):
        writer_for(output, three[:2])
    (tmp_path / "r.jsonl.partial").touch()
    with pytest.raises(InputError, match=r"both the output and its .partial"):
        writer_for(output, three)
    with pytest.raises(InputError, match="not a file"):
        writer_for(tmp_path, three)


def test_a_malformed_line_in_the_middle_of_an_output_is_refused(tmp_path: Path, three: list[Rollout]) -> None:
    output = tmp_path / "r.jsonl"
    output.write_text(f"{three[0].to_json()}\nnonsense\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"r.jsonl:2: malformed JSON"):
        writer_for(output, three)


def test_a_run_that_ends_early_leaves_only_the_partial_file(tmp_path: Path, three: list[Rollout]) -> None:
    output = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt), writer_for(output, three) as writer:
        writer.write(three[:1])
        raise KeyboardInterrupt
    with pytest.raises(ZedaError, match="1 of 3 responses"), writer_for(output, three):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl.partial"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, three: list[Rollout], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZedaError, match="the disk is full"), writer_for(tmp_path / "r.jsonl", three) as writer:

        class Full:
            def write(self, data: bytes) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                pass

        monkeypatch.setattr(writer, "_file", Full())
        writer.write(three)
    assert not (tmp_path / "r.jsonl").exists()
