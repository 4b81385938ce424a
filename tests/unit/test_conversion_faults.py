"""Damaged checkpoints: nothing wrong is accepted, and the error names the tensor and the file.

``tests/faults.py`` says what is done. docs/verification.md counts what was tried and what was caught; the last test
here compares its table with what is run.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from checkpoints import make_hf, nothing_beside
from faults import Fault
from killing import POINTS, SHARES, SIZES, SMALL_FILES, TOOLS

from megatron_zeda.conversion import (
    exporting,
    hf_to_megatron,
    importing,
    inject_zero_experts,
    injecting,
    megatron_to_hf,
    verify_checkpoint,
)
from megatron_zeda.conversion.background import Verifier
from megatron_zeda.conversion.folders import sha256
from megatron_zeda.errors import InputError, ZedaError

FAMILIES = ("qwen3_moe", "glm4_moe_lite")
DOCUMENT = Path(__file__).parents[2] / "docs/verification.md"
Case = tuple[str, Fault, str]


def _cases(table: list[Fault]) -> list[Any]:
    """Every fault, family and target; the tools are a loop inside."""
    found = []
    for fault in table:
        for family in fault.families:
            for target in fault.targets(family):
                name = f"{fault.name}-{family}" + (f"-{target}" if fault.every_target else "")
                found.append(pytest.param(family, fault, target, id=name.replace(" ", "_")))
    return found


class Good:
    """Undamaged checkpoints of one family, made when they are first asked for."""

    def __init__(self, folder: Path, family: str) -> None:
        self._folder, self._family = folder, family

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        path = self._folder / name
        if not path.exists():
            make(path)
        return path

    @property
    def static(self) -> Path:
        """Small shards, the layer that drafts tokens included where the family has one."""
        mtp = self._family != "qwen3_moe"
        return self._made("static", lambda path: make_hf(path, family=self._family, shards=True, mtp=mtp))

    @property
    def downloaded(self) -> Path:
        """The same with the hub's notes."""

        def make(path: Path) -> None:
            shutil.copytree(self.static, path)
            faults.note_downloads(path)

        return self._made("downloaded", make)

    @property
    def dynamic(self) -> Path:
        """Made by injection, so it has our manifest."""
        return self._made("dynamic", lambda path: inject_zero_experts(self.static, path, shard_bytes=SMALL_FILES))

    @property
    def megatron(self) -> Path:
        """Imported from :attr:`dynamic`."""
        return self._made("megatron", lambda path: hf_to_megatron(self.dynamic, path))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Good]:
    folder = tmp_path_factory.mktemp("good")
    return {family: Good(folder / family, family) for family in FAMILIES}


def _found_by(tool: str, source: Path, reference: Path) -> str | None:
    """What a tool says of a checkpoint; None if it accepts it."""
    out = source.parent / "out"
    try:
        if tool == "verify":
            lines = verify_checkpoint(reference, source)
            return "\n".join(lines) or None
        {"inject": inject_zero_experts, "import": hf_to_megatron, "export": megatron_to_hf}[tool](source, out)
    except ZedaError as error:
        assert "\n" not in str(error)
        assert nothing_beside(out)
        return str(error)
    shutil.rmtree(out)
    return None


def _check(source: Path, fault: Fault, target: str, reference: Path, tools: tuple[str, ...]) -> None:
    words = fault.hurt(source, target)
    for tool in tools:
        found = _found_by(tool, source, reference)
        assert found is not None, f"{tool} accepts it"
        if not found.startswith(str(source)):
            assert found.startswith(("model.", "lm_head.")), found  # the lines of a comparison, one for every tensor
            tensors = [word for word in words if word.startswith(("model.", "lm_head."))]
            assert not tensors or any(word in found for word in tensors), f"{tool} says: {found}"
            continue
        for word in words:
            assert word in found, f"{tool} says: {found}"


@pytest.mark.parametrize("family", FAMILIES)
def test_undamaged_checkpoints_are_accepted(tmp_path: Path, good: dict[str, Good], family: str) -> None:
    """So that what the others find is the fault."""
    found = good[family]
    for number, (tool, source) in enumerate(
        [
            ("inject", found.static),
            ("import", found.static),
            ("inject", found.downloaded),
            ("import", found.downloaded),
            ("import", found.dynamic),
            ("export", found.megatron),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        copy = shutil.copytree(source, tmp_path / str(number) / "source")
        assert _found_by(tool, copy, copy) is None
    for one, two in itertools.product([found.dynamic, found.megatron], repeat=2):
        assert verify_checkpoint(one, two) == []


@pytest.mark.parametrize(("family", "fault", "target"), _cases(faults.PLAIN_FAULTS))
def test_a_damaged_checkpoint(tmp_path: Path, good: dict[str, Good], family: str, fault: Fault, target: str) -> None:
    source = shutil.copytree(good[family].static, tmp_path / "source")
    _check(source, fault, target, good[family].static, fault.tools)


@pytest.mark.parametrize(("family", "fault", "target"), _cases(faults.KNOWN_FAULTS))
def test_a_damaged_download(tmp_path: Path, good: dict[str, Good], family: str, fault: Fault, target: str) -> None:
    source = shutil.copytree(good[family].downloaded, tmp_path / "source")
    words = fault.hurt(source, target)
    for tool in ("inject", "import"):
        found = _found_by(tool, source, good[family].static)
        assert found is not None, f"{tool} accepts it"
        assert words[-1] in found


@pytest.mark.parametrize(("family", "fault", "target"), _cases(faults.KNOWN_FAULTS))
def test_a_damaged_output_of_ours(
    tmp_path: Path, good: dict[str, Good], family: str, fault: Fault, target: str
) -> None:
    source = shutil.copytree(good[family].dynamic, tmp_path / "source")
    words = fault.hurt(source, target)
    found = _found_by("import", source, good[family].dynamic)
    assert found is not None, "import accepts it"
    assert words[-1] in found


@pytest.mark.parametrize(("family", "fault", "target"), _cases(faults.COMPARED_FAULTS))
def test_a_difference(tmp_path: Path, good: dict[str, Good], family: str, fault: Fault, target: str) -> None:
    source = shutil.copytree(good[family].dynamic, tmp_path / "source")
    words = fault.hurt(source, target)
    for reference in (good[family].dynamic, good[family].megatron):
        found = _found_by("verify", source, reference)
        assert found is not None
        assert words[0] in found


@pytest.mark.parametrize(("family", "fault", "target"), _cases(faults.MEGATRON_FAULTS))
def test_a_damaged_megatron_checkpoint(
    tmp_path: Path, good: dict[str, Good], family: str, fault: Fault, target: str
) -> None:
    source = shutil.copytree(good[family].megatron, tmp_path / "source")
    _check(source, fault, target, good[family].dynamic, fault.tools)


# ---- while a conversion runs, and between two runs ------------------------------------------------------------------


def _convert(tool: str, found: Good, out: Path) -> None:
    """Run a converter so that it writes several files."""
    if tool == "inject":
        inject_zero_experts(found.static, out, shard_bytes=SMALL_FILES)
    elif tool == "import":
        hf_to_megatron(found.dynamic, out, file_bytes=SMALL_FILES)
    else:
        megatron_to_hf(found.megatron, out, shard_bytes=SMALL_FILES)


def _contents(folder: Path) -> dict[str, str]:
    """Every file and its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", faults.DISK_FAULTS)
def test_a_disk_that_does_not_keep_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: dict[str, Good], name: str, tool: str, family: str
) -> None:
    """A file changes between being written and being read back."""
    _ = good[family].megatron  # made before anything is damaged
    written: list[Path] = []
    submit = Verifier.submit

    def damaged(self: Verifier, file: str, check: Callable[[], str], **record: Any) -> None:
        path = self._out.partial / file
        if path.stat().st_size > 10_000:
            written.append(path)
            if len(written) == 2:
                faults.DISK_FAULTS[name](path)
        submit(self, file, check, **record)

    monkeypatch.setattr(Verifier, "submit", damaged)
    with pytest.raises(ZedaError) as caught:
        _convert(tool, good[family], tmp_path / "out")
    assert written[1].name in str(caught.value)
    assert "verification failed" in str(caught.value) or isinstance(caught.value, InputError)
    assert nothing_beside(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", faults.TABLE_FAULTS)
def test_a_program_that_forgets_or_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: dict[str, Good], name: str, tool: str, family: str
) -> None:
    """The weight table changes after the source was checked against it."""
    paths = good[family].static, good[family].dynamic, good[family].megatron  # made before anything is damaged
    assert all(path.is_dir() for path in paths)
    for module, reader in ((injecting, "_Injected"), (importing, "HfFolder"), (exporting, "MegatronFolder")):
        monkeypatch.setattr(module, reader, _with_table(getattr(module, reader), faults.TABLE_FAULTS[name], tool))
    with pytest.raises(ZedaError, match=r"experts"):
        _convert(tool, good[family], tmp_path / "out")
    assert nothing_beside(tmp_path / "out")


def _with_table(reader: Any, change: Callable[[list[Any]], None], tool: str) -> Any:
    """A reader whose table is changed once it was used to check the source; only the first that is made."""
    made: list[Any] = []

    class Changed(reader):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if not made:
                change(self.rows)
            made.append(self)

    return Changed


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", faults.LEFT_OVER_FAULTS)
def test_an_unfinished_output_that_was_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: dict[str, Good], name: str, tool: str
) -> None:
    """An interrupted run is continued to the right result, whatever happened to what it left."""
    found = good["glm4_moe_lite"]
    _convert(tool, found, tmp_path / "undamaged")
    submit, calls = Verifier.submit, []

    def interrupted(self: Verifier, file: str, *args: Any, **options: Any) -> None:
        calls.append(file)
        if len(calls) == 5:
            raise KeyboardInterrupt
        submit(self, file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _convert(tool, found, tmp_path / "out")
    partial, journal = tmp_path / ".out.partial", tmp_path / ".out.partial.journal"
    assert not (tmp_path / "out").exists()
    assert partial.is_dir() and journal.is_file()
    faults.LEFT_OVER_FAULTS[name](partial, partial / calls[1], journal)
    _convert(tool, found, tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(tmp_path / "undamaged")
    assert not partial.exists() and not journal.exists()


# ---- the count ------------------------------------------------------------------------------------------------------


def _tried() -> dict[str, int]:
    """Stage, as docs/verification.md calls it -> number of damaged checkpoints or runs times tools that saw them."""

    def cases(table: list[Fault], tools: int | None = None) -> int:
        return sum(
            len(fault.targets(family)) * (len(fault.tools) if tools is None else tools)
            for fault in table
            for family in fault.families
        )

    return {
        "a source of which nothing is known": cases(faults.PLAIN_FAULTS),
        "a source with known hashes": cases(faults.KNOWN_FAULTS, 2) + cases(faults.KNOWN_FAULTS, 1),
        "a comparison": cases(faults.COMPARED_FAULTS, 2),
        "a Megatron checkpoint": cases(faults.MEGATRON_FAULTS),
        "the disk, while converting": len(faults.DISK_FAULTS) * len(TOOLS) * len(FAMILIES),
        "the program, while converting": len(faults.TABLE_FAULTS) * len(TOOLS) * len(FAMILIES),
        "what an interrupted run left": len(faults.LEFT_OVER_FAULTS) * len(TOOLS),
        "SIGKILL at random points": POINTS * len(TOOLS),
        "a full disk": (len(SHARES) + len(SIZES) + 1) * len(TOOLS),
    }


def test_the_documented_count_is_what_is_tried() -> None:
    """What is caught is a test of its own each time, here and in test_conversion_killed.py, and fails otherwise."""
    tried = _tried()
    tried["together"] = sum(tried.values())
    rows = dict(re.findall(r"^\| ([^|]+?) \|[^|]*\|[^|]*\| ([\d,]+) \| [\d,]+ \|$", DOCUMENT.read_text(), re.M))
    caught = dict(re.findall(r"^\| ([^|]+?) \|[^|]*\|[^|]*\| [\d,]+ \| ([\d,]+) \|$", DOCUMENT.read_text(), re.M))
    print("\n" + "\n".join(f"{stage}: {count} tried, {count} caught" for stage, count in tried.items()))
    assert {stage: int(count.replace(",", "")) for stage, count in rows.items()} == tried
    assert caught == rows
