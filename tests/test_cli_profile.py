"""profile, profile kit and profile import, as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edgeqdm import cli, tuning
from edgeqdm.cli_output import profile_table, profile_value
from edgeqdm.ir.codec import dump_record, read_record
from edgeqdm.ir.precision import FP32, TABLE, W8A8, Precision
from edgeqdm.ir.profile import (
    REFUSED_FLAGS,
    Flag,
    KitManifest,
    LatencyProfile,
    is_sealed,
    sealed_profile,
)
from edgeqdm.models.load import load
from edgeqdm.profile.adopt import read_profile, shipped_profiles
from edgeqdm.profile.predict import count_forks
from edgeqdm.testing.tiny import DIT_CONFIG, build_network, write_pipeline

SAMPLER = ("--scheduler", "ddim", "--steps", "4")
QUICK = ("--seconds", "0.05", "--name", "this host")
W8 = Precision("w8")
ONE_BLOCK = DIT_CONFIG | {"num_layers": 1}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def value_of(*arguments: object) -> dict[str, Any]:
    """The JSON object a verb prints; nothing else may be printed."""
    result = call(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(*arguments: object) -> tuple[int, str]:
    """Exit code and the one line of an error."""
    result = call(*arguments, "--quiet")
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return result.exit_code, line


class Folder:
    """A DiT of one block, a profile of this host, and a kit of what that lacks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = write_pipeline(path / "model", build_network(ONE_BLOCK), ONE_BLOCK)
        self.profile, self.work = path / "host.json", path / "work"
        self.value = value_of(
            *("profile", self.model, "-o", self.profile, "--precision", "w8a8", "--wholes", 3),
            *(*QUICK, *SAMPLER, "--work", self.work),
        )
        (self.measured,) = self.work.iterdir()
        (self.written,) = self.measured.glob("results-1*.jsonl")
        # A copy: whoever runs the kit again adds to its own.
        self.results = Path(shutil.copy(self.written, path / "results.jsonl"))
        self.kit = path / "kit"
        # Only what the first profile lacks: the layers at one more precision.
        self.kit_value = value_of(
            *("profile", "kit", self.model, "-o", self.kit, "--precision", "w8"),
            *("--wholes", 3, "--missing-from", self.profile, *SAMPLER),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def stored(path: Path) -> LatencyProfile:
    return read_record(path, LatencyProfile)


def nothing_but(tmp_path: Path, *names: str) -> bool:
    return {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_profile_of_this_host_has_every_operation_at_the_precision_asked(
    folder: Folder,
) -> None:
    profile = read_profile(folder.profile, target="onnxruntime", accept=REFUSED_FLAGS).profile
    space = tuning.open_space(
        load(str(folder.model), scheduler="ddim", steps=4), precisions=(W8A8,)
    )
    assert {(e.key, e.precision) for e in profile.entries} == set(space.entries())
    assert {e.precision for e in profile.entries} == {FP32, W8A8}
    # One whole network per precision and three that mix them; what is looked up stays a table.
    assert len(profile.wholes) == 5
    for whole in profile.wholes:
        assert {n for n, p in whole.precisions.items() if p == TABLE} == set(space.tables)
    assert (profile.device.name, profile.threads) == ("this host", 1)


def test_a_profile_is_told_as_it_was_stored(folder: Folder) -> None:
    profile = stored(folder.profile)
    assert is_sealed(profile)
    assert folder.value["profile"] == str(folder.profile)
    assert folder.value["device"] == profile.device.model_dump(mode="json")
    assert folder.value["runtime"] == profile.runtime.model_dump(mode="json")
    assert folder.value["entries"] == len(profile.entries)
    assert folder.value["wholes"] == 5
    assert folder.value["flags"] == [str(flag) for flag in profile.flags]
    assert folder.value["phase_costs"] == len(profile.phase_costs) == 2
    network = tuning.network_keys(load(str(folder.model), scheduler="ddim", steps=4))
    longer = [
        (c.among.median_us - c.alone.median_us) / count_forks(network, [c.precisions, c.other])
        for c in profile.phase_costs
    ]
    assert folder.value["fork_us"] == pytest.approx(max(0.0, sum(longer) / 2))
    error = folder.value["prediction_error"]
    # Mixes may be of one precision by chance; of fewer than three there is no error to tell.
    mixed = [w for w in profile.wholes if len(set(w.precisions.values())) > 1]
    assert (error is None) == (len(mixed) < 3)
    assert error is None or error["n"] == len(mixed)


def test_what_phases_cost_is_told_of_models_they_were_timed_of(folder: Folder) -> None:
    profile = stored(folder.profile)
    denoiser = load(str(folder.model), scheduler="ddim", steps=4)
    others = [cost.model_copy(update={"model": "f" * 64}) for cost in profile.phase_costs]
    for costs, told in ((profile.phase_costs, True), (others, False), ((), False)):
        found = profile.model_copy(update={"phase_costs": tuple(costs)})
        fitted = tuning.fit_latency(found, tuning.network_keys(denoiser))
        assert (profile_value(folder.profile, found, fitted)["fork_us"] is not None) == told
        labels = list(profile_table(found, fitted).columns[0].cells)
        assert ("several phases" in labels) == told
    assert profile_value(folder.profile, profile, None)["fork_us"] is None


def test_costs_of_plans_follow_from_the_profile(folder: Folder) -> None:
    denoiser = load(str(folder.model), scheduler="ddim", steps=4)
    space = tuning.open_space(denoiser, precisions=(W8A8,))
    costs = tuning.cost_model(stored(folder.profile), space)
    assert costs.latency.mean_us(space.base) > 0
    every = [a.precision for a in space.base.phases[0].layers]
    assert W8A8 in every
    bytes_by_rule = costs.storage.predict_bytes(
        [{a.layer: a.precision for a in space.base.phases[0].layers}]
    )
    in_float = costs.storage.predict_bytes([dict.fromkeys(space.tables, TABLE)])
    assert bytes_by_rule[0] < in_float[0]


def test_the_same_work_folder_is_only_read_again(folder: Folder, out: Path) -> None:
    before = folder.written.read_bytes()
    arguments = ("profile", folder.model, "-o", out, "--precision", "w8a8", "--wholes", 3)
    again = value_of(*arguments, *QUICK, *SAMPLER, "--work", folder.work)
    assert again["entries"] == folder.value["entries"]
    assert stored(out).entries == stored(folder.profile).entries
    assert folder.written.read_bytes().startswith(before)


def test_results_for_people_name_device_entries_and_file(folder: Folder, out: Path) -> None:
    result = call("profile", "import", folder.results, "--kit", folder.measured, "-o", out)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    n = folder.value["entries"]
    assert ["entries", f"{n},", str(n), "measured"] in rows
    assert ["whole", "networks", "5"] in rows
    assert "this host" in result.stdout
    assert "CPU time" in result.stdout
    assert result.stdout.splitlines()[-1] == str(out)


def test_a_kit_of_what_a_profile_lacks_has_no_more_than_that(folder: Folder) -> None:
    manifest = read_record(folder.kit / "kit.json", KitManifest)
    entries = [graph for graph in manifest.graphs if graph.role == "entry"]
    assert {graph.precision for graph in entries} == {W8}
    assert {graph.key for graph in entries} == {e.key for e in stored(folder.profile).entries}
    assert {graph.role for graph in manifest.graphs} == {"reference", "overhead", "entry"}
    assert folder.kit_value == {
        "kit": str(folder.kit),
        "graphs": len(manifest.graphs),
        "target": "onnxruntime",
    }
    assert (folder.kit / "bench.py").is_file()


def test_a_kit_is_made_of_what_a_profile_lacks_that_comes_with_edgeqdm(
    folder: Folder, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its name: no file of that name is there."""
    name, *_ = shipped_profiles()
    monkeypatch.chdir(tmp_path)
    given = ("profile", "kit", folder.model, "-o", out, "--precision", "w8a8", "--wholes", 0)
    value = value_of(*given, "--missing-from", name, *SAMPLER)
    assert value["graphs"] == len(read_record(out / "kit.json", KitManifest).graphs)
    code, line = refusal(*given[:4], out / "other", "--missing-from", "pixel-99", *SAMPLER)
    assert (code, line[:15]) == (3, "error[EQ-3523]:")
    assert name in line


def test_a_kit_of_nothing_missing_is_refused(folder: Folder, tmp_path: Path) -> None:
    code, line = refusal(
        *("profile", "kit", folder.model, "-o", tmp_path / "kit", "--precision", "w8a8"),
        *("--missing-from", folder.profile, *SAMPLER),
    )
    assert (code, line[:15]) == (3, "error[EQ-3501]:")
    assert nothing_but(tmp_path)


def test_imported_results_are_the_profile_that_was_measured(folder: Folder, out: Path) -> None:
    value = value_of("profile", "import", folder.results, "--kit", folder.measured, "-o", out)
    assert value["profile"] == str(out)
    assert value["prediction_error"] is None
    assert stored(out) == stored(folder.profile)


def test_import_adds_to_the_profile_of_the_same_device(folder: Folder, out: Path) -> None:
    profile = stored(folder.profile)
    some = sealed_profile(profile.model_copy(update={"entries": profile.entries[:1], "wholes": ()}))
    out.write_bytes(dump_record(some))
    arguments = ("profile", "import", folder.results, "--kit", folder.measured, "-o", out)
    value_of(*arguments, "--add")
    assert {(e.key, e.precision) for e in stored(out).entries} == {
        (e.key, e.precision) for e in profile.entries
    }
    other = profile.device.model_copy(update={"name": "another"})
    alien = sealed_profile(profile.model_copy(update={"device": other}))
    out.write_bytes(before := dump_record(alien))
    code, line = refusal(*arguments, "--add")
    assert (code, line[:15]) == (3, "error[EQ-3525]:")
    assert out.read_bytes() == before


def test_a_flagged_profile_can_be_added_to_and_stays_flagged(folder: Folder, out: Path) -> None:
    profile = stored(folder.profile)
    flagged = sealed_profile(profile.model_copy(update={"flags": (Flag.EMULATOR,)}))
    out.write_bytes(dump_record(flagged))
    value = value_of(
        *("profile", "import", folder.results, "--kit", folder.measured, "-o", out, "--add")
    )
    assert "emulator" in value["flags"]


# What is refused.


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", "\x00\n", "{", '{"graph": "0000"}\n'])
def test_results_that_are_none_are_refused(
    folder: Folder, text: str, tmp_path: Path, out: Path
) -> None:
    wrong = tmp_path / "results.jsonl"
    wrong.write_text(text)
    code, line = refusal("profile", "import", wrong, "--kit", folder.measured, "-o", out)
    assert code == 3
    assert str(wrong) in line
    assert nothing_but(tmp_path, wrong.name)


def test_results_of_another_kit_are_refused(folder: Folder, out: Path, tmp_path: Path) -> None:
    code, line = refusal("profile", "import", folder.results, "--kit", folder.kit, "-o", out)
    assert (code, line[:15]) == (3, "error[EQ-3502]:")
    assert str(folder.results) in line
    assert nothing_but(tmp_path)


def test_results_cut_off_are_refused_and_say_how_to_go_on(
    folder: Folder, tmp_path: Path, out: Path
) -> None:
    cut = tmp_path / "results.jsonl"
    cut.write_bytes(folder.results.read_bytes()[:-7])
    code, line = refusal("profile", "import", cut, "--kit", folder.measured, "-o", out)
    assert (code, line[:15]) == (3, "error[EQ-3503]:")
    assert "run bench.py or edgeqdm-bench again" in line


@pytest.mark.parametrize("what", ["results", "kit"])
def test_a_missing_input_is_refused_by_its_name(
    folder: Folder, what: str, tmp_path: Path, out: Path
) -> None:
    gone = tmp_path / "gone"
    given = {"results": folder.results, "kit": folder.measured} | {what: gone}
    code, line = refusal("profile", "import", given["results"], "--kit", given["kit"], "-o", out)
    assert code == 3
    assert str(gone) in line
    assert nothing_but(tmp_path)


VERBS = (("profile",), ("profile", "host"), ("profile", "kit"))


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_an_unknown_precision_is_refused_with_examples(
    folder: Folder, verb: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = (*verb, folder.model, "-o", tmp_path / "x", "--precision", "w5a8")
    code, line = refusal(*arguments)
    assert code == 3
    assert line.startswith("error[EQ-3805]: 'w5a8' is no precision; examples: w8a8")
    assert nothing_but(tmp_path)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("precision", ["table", "w4a4"])
def test_a_precision_without_a_kernel_is_refused_with_those_that_have_one(
    folder: Folder, verb: tuple[str, ...], precision: str, tmp_path: Path
) -> None:
    arguments = (*verb, folder.model, "-o", tmp_path / "x", "--precision", precision)
    code, line = refusal(*arguments, *SAMPLER)
    assert code == 4
    assert line.startswith(f"error[EQ-4310]: the target has no kernel for {precision}")
    assert "w4a8" in line
    assert nothing_but(tmp_path)


def test_a_file_that_is_there_is_replaced_by_force_only(folder: Folder, out: Path) -> None:
    out.write_text("work of hours")
    imported = ("profile", "import", folder.results, "--kit", folder.measured, "-o", out)
    for arguments in (("profile", folder.model, "-o", out), imported):
        code, line = refusal(*arguments)
        assert code == 7
        assert line == f"error[EQ-7804]: a file is there already ({out}) - --force replaces it"
        assert out.read_text() == "work of hours"
    value_of(*imported, "--force")
    assert stored(out) == stored(folder.profile)


def test_a_folder_that_is_there_is_never_replaced(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    code, line = refusal("profile", "kit", folder.model, "-o", tmp_path / "kit", *SAMPLER)
    assert (code, line[:15]) == (7, "error[EQ-7112]:")
    for arguments in (
        ("profile", folder.model, "-o", tmp_path / "kit", *SAMPLER),
        ("profile", "import", folder.results, "--kit", folder.measured, "-o", tmp_path / "kit"),
    ):
        code, line = refusal(*arguments)
        assert (code, line[:15]) == (7, "error[EQ-7103]:")
    assert list((tmp_path / "kit").iterdir()) == []


def test_a_profile_to_add_to_must_be_there_and_sound(
    folder: Folder, out: Path, tmp_path: Path
) -> None:
    verbs = (
        ("profile", folder.model, "-o", out, "--add", *SAMPLER),
        ("profile", "import", folder.results, "--kit", folder.measured, "-o", out, "--add"),
    )
    for arguments in verbs:
        code, line = refusal(*arguments)
        assert (code, line[:15]) == (3, "error[EQ-3523]:")
        assert nothing_but(tmp_path)
    shutil.copy(folder.profile, out)
    out.write_text(before := out.read_text().replace('"threads": 1', '"threads": 2'))
    for arguments in verbs:
        code, line = refusal(*arguments)
        assert (code, line[:15]) == (3, "error[EQ-3520]:")
    assert out.read_text() == before


@pytest.mark.parametrize("option", [("--name", "caf\u00e9"), ("--power-mode", "")])
def test_a_text_that_no_profile_can_hold_is_refused_before_the_measurement(
    folder: Folder, option: tuple[str, str], out: Path, tmp_path: Path
) -> None:
    arguments = ("profile", folder.model, "-o", out, "--precision", "w8a8", "--wholes", 3)
    work = tmp_path / "work"
    shutil.copytree(folder.work, work, ignore=shutil.ignore_patterns("results*"))
    code, line = refusal(*arguments, "--seconds", "0.05", *SAMPLER, "--work", work, *option)
    assert code in (2, 3)
    assert line.startswith("error[EQ-")
    assert not list(work.rglob("results*"))


def test_an_unknown_target_is_refused(folder: Folder, tmp_path: Path) -> None:
    for verb in VERBS:
        code, line = refusal(*verb, folder.model, "-o", tmp_path / "x", "--target", "abacus")
        assert (code, line[:15]) == (4, "error[EQ-4301]:")
    assert nothing_but(tmp_path)


def test_an_interrupted_measurement_goes_on_and_leaves_no_profile(
    folder: Folder, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ("profile", folder.model, "-o", out, "--precision", "w8a8", "--wholes", 3)
    given = (*arguments, *QUICK, *SAMPLER, "--work", folder.work)
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "run_kit", interrupted)
        result = call(*given, "--quiet")
    assert result.exit_code == 130
    assert nothing_but(tmp_path)
    assert value_of(*given)["entries"] == folder.value["entries"]


@pytest.mark.parametrize("flag", ["noisy", "ci_not_reached", "unstable", "haunted"])
def test_a_flag_that_nothing_is_refused_for_cannot_be_accepted(
    flag: str, folder: Folder, tmp_path: Path
) -> None:
    code, line = refusal(
        *("search", folder.model, "-o", tmp_path / "x", "--profile", folder.profile),
        *("--trials", 1, "--accept-flag", flag, *SAMPLER),
    )
    assert (code, line[:15]) == (3, "error[EQ-3809]:")
    assert f"'{flag}' is no flag that figures are refused for" in line
    assert "choose among " + ", ".join(sorted(REFUSED_FLAGS)) in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "model"],
        ["profile", "model", "-o", "x", "--threads", "0"],
        ["profile", "model", "-o", "x", "--seconds", "0"],
        ["profile", "model", "-o", "x", "--wholes", "-1"],
        ["profile", "kit", "model"],
        ["profile", "import", "results", "-o", "x"],
        ["profile", "import", "--kit", "k", "-o", "x"],
    ],
)
def test_a_usage_error_ends_with_2_and_one_line(arguments: list[str]) -> None:
    code, line = refusal(*arguments)
    assert code == 2
    assert line.startswith("error[EQ-2001]: ")


@pytest.mark.parametrize("verb", ["host", "kit", "import"])
def test_help_of_a_verb_has_an_example_and_fits_a_line(verb: str) -> None:
    text = call("profile", verb, "--help").stdout
    assert "\n  edgeqdm profile " in text
    assert all(len(line) <= 100 for line in text.splitlines())
    everything = call("profile", "--help").stdout
    assert verb in everything
