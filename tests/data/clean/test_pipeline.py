"""The whole `clean` job on small raw corpora of all seven sources."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llama_ray.config import CleanConfig, PrepareConfig
from llama_ray.data.clean.describe import describe_clean
from llama_ray.data.clean.manifest import CorpusManifest, corpus_folder
from llama_ray.data.clean.page import render
from llama_ray.data.clean.pipeline import clean
from llama_ray.data.clean.report import Report
from llama_ray.data.prepare import prepare
from llama_ray.errors import UserError
from llama_ray.local import Head
from llama_ray.storage import Storage
from tests.data.clean.raw import (
    COPIED,
    MENU,
    clean_config,
    kept,
    prose,
    write_corpora,
    write_evaluation_sets,
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_corpora(folder)
    write_evaluation_sets(folder / "eval")
    return folder


@pytest.fixture(scope="module")
def cleaned(ray_cluster: Head, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> CleanConfig:
    config = clean_config(
        tmp_path_factory.mktemp("store"), raw, decontaminate={"path": str(raw / "eval")}
    )
    clean(config)
    return config


def report(config: CleanConfig) -> Report:
    folder = corpus_folder(config.name)
    return Report.from_json(Storage(config.storage).read(f"{folder}/report.json"))


def test_every_source_yields_its_documents(cleaned: CleanConfig) -> None:
    documents = kept(cleaned)
    lines = documents["c4"]["https://c4.org/40"].split("\n")
    assert lines == [line for line in prose(40) if line.endswith(".")]
    (paper,) = documents["arxiv"].values()
    assert paper.count("\\section{") == 4
    assert "The gradient vanishes." in paper
    assert len(documents["github"]) == 6
    assert len(documents["wikipedia"]) == 40
    assert all("Category" not in text for text in documents["wikipedia"].values())
    assert all("*** END" not in text for text in documents["books"].values())
    answers = sorted(text.count("A: ") for text in documents["stackexchange"].values())
    assert answers[1:] == [3] * 5
    assert prose(12)[0] in documents["commoncrawl"]["https://example.org/12"]


def test_what_several_sources_have_stays_where_priority_says(cleaned: CleanConfig) -> None:
    holders = [
        source
        for source, documents in kept(cleaned).items()
        if any(COPIED in text for text in documents.values())
    ]
    assert holders == ["wikipedia"]
    duplicates = report(cleaned).duplicates
    assert duplicates["c4"] == {"wikipedia": 1}
    assert duplicates["commoncrawl"] == {"wikipedia": 1}


def test_menus_are_gone_from_all_pages_but_one(cleaned: CleanConfig) -> None:
    pages = kept(cleaned)["commoncrawl"].values()
    assert sum(MENU in text for text in pages) <= 1
    assert report(cleaned).sources["commoncrawl"].trimmed["repeated paragraph"].documents >= 20


def test_a_book_that_is_in_another_goes(cleaned: CleanConfig) -> None:
    names = sorted(Path(id).name for id in kept(cleaned)["books"])
    assert names == ["complete.txt", "second.txt"]
    assert report(cleaned).sources["books"].removed["contained in another book"].documents == 1


def test_answers_of_the_evaluation_sets_are_found_and_removed(cleaned: CleanConfig) -> None:
    documents = kept(cleaned)["stackexchange"]
    assert len(documents) == 6
    assert not any("vermilion" in text for text in documents.values())
    assert "vermilion" in str(report(cleaned).sources["stackexchange"].trimmed)
    found = report(cleaned).contamination
    assert found is not None
    riddles = found.benchmarks["riddles"]
    assert (riddles.items, riddles.checkable, len(riddles.found)) == (2, 1, 1)
    assert riddles.documents == {"stackexchange": 1}


def test_the_report_accounts_for_every_document(cleaned: CleanConfig) -> None:
    for source, ledger in report(cleaned).sources.items():
        gone = sum(rule.documents for rule in ledger.removed.values())
        assert ledger.documents_in == ledger.documents_out + gone, source
        assert ledger.documents_out == len(kept(cleaned)[source])
        assert ledger.kept.examples


def test_the_page_shows_every_source_and_rule(cleaned: CleanConfig) -> None:
    facts = report(cleaned)
    page = render(facts)
    for source, ledger in facts.sources.items():
        assert f'id="{source}"' in page
        assert all(rule in page for rule in ledger.removed)
    assert "riddles" in page
    assert "<script" not in page
    assert Storage(cleaned.storage).exists(f"{corpus_folder(cleaned.name)}/report.html")


def test_text_of_the_corpus_cannot_break_the_page(cleaned: CleanConfig) -> None:
    facts = report(cleaned)
    facts.sources["c4"].remove("odd", "<script>id</script>", "<script>alert(1)</script>")
    assert "<script>" not in render(facts)


def test_a_second_run_has_nothing_to_do(
    cleaned: CleanConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Storage(cleaned.storage).list("")
    clean(cleaned)
    assert "is cleaned already" in capsys.readouterr().out
    assert Storage(cleaned.storage).list("") == before


def test_another_configuration_or_other_files_are_refused(cleaned: CleanConfig, raw: Path) -> None:
    other = cleaned.model_copy(
        update={"deduplicate": cleaned.deduplicate.model_copy(update={"bands": 7})}
    )
    with pytest.raises(UserError, match=r"^name: .* \(differs in deduplicate\.bands\)"):
        clean(other)
    added = raw / "c4/c4-train.00001.json.gz"
    added.write_bytes(gzip.compress(b'{"text": "new"}\n'))
    try:
        with pytest.raises(UserError, match=r"^name: .* files at sources\.\*\.path"):
            clean(cleaned)
    finally:
        added.unlink()


def test_tokens_are_made_of_the_corpus(cleaned: CleanConfig) -> None:
    config = PrepareConfig.model_validate(
        {
            "name": "tokens",
            "storage": {"url": cleaned.storage.url},
            "corpus": {"clean": cleaned.name, "validation_fraction": 0.1},
            "tokenizer": {"vocab_size": 400},
        }
    )
    manifest = prepare(config)
    assert set(manifest.split("train")) <= set(kept(cleaned))
    assert manifest.corpus.documents_read == sum(map(len, kept(cleaned).values()))


def test_damaged_files_are_named_and_the_rest_is_kept(
    ray_cluster: Head, raw: Path, tmp_path: Path
) -> None:
    rows = "".join(
        json.dumps({"url": f"https://c4.org/{i}", "text": "\n".join(prose(i))}) + "\n"
        for i in range(40, 52)
    )
    whole = gzip.compress(rows.encode())
    folder = tmp_path / "c4"
    folder.mkdir()
    (folder / "a.json.gz").write_bytes(whole)
    (folder / "b.json.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "c.json.gz").write_bytes(b"")
    (folder / "d.json.gz").write_bytes(b"no gzip at all")
    config = CleanConfig.model_validate(
        {
            "name": "damaged",
            "storage": {"url": f"file://{tmp_path}/store"},
            "sources": {"c4": {"path": str(folder), "heuristics": False}},
        }
    )
    clean(config)
    assert len(kept(config)["c4"]) == 12
    damaged = report(config).sources["c4"].damaged
    assert sorted(Path(name).name for name in damaged) == ["b.json.gz", "d.json.gz"]
    with pytest.raises(UserError, match=r"^sources\.c4\.path: .*b\.json\.gz is cut short"):
        clean(config.model_copy(update={"name": "strict", "on_damage": "stop"}))


def test_names_that_are_no_utf8_and_sources_that_yield_nothing(
    ray_cluster: Head, raw: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("\n\n".join(prose(0)))
    (folder / "empty.txt").write_text("")
    sources = {"books": {"path": str(folder)}}
    config = CleanConfig.model_validate(
        {"name": "names", "storage": {"url": f"file://{tmp_path}/store"}, "sources": sources}
    )
    clean(config)
    assert len(kept(config)["books"]) == 1
    sources["books"]["min_document_chars"] = 10**6
    nothing = CleanConfig.model_validate(config.model_dump() | {"name": "none", "sources": sources})
    with pytest.raises(UserError, match=r"^sources: no document is left"):
        clean(nothing)


def test_mistakes_are_told_before_anything_runs(raw: Path, tmp_path: Path) -> None:
    config = clean_config(tmp_path, raw, sources={"books": {"path": str(tmp_path / "none")}})
    with pytest.raises(UserError, match=r"^sources\.books\.path: .* does not exist"):
        clean(config)


def test_dry_run_prints_and_touches_nothing(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe_clean(clean_config(tmp_path / "store", raw))
    assert "corpora/corpus" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_killed_at_any_step_a_run_completes_to_the_same_manifest(
    ray_head: Head, raw: Path, tmp_path: Path
) -> None:
    """`kill -9` of the driver, once in each step that leaves something."""
    sources = {"c4": {"path": str(raw / "c4"), "heuristics": False}}
    sources["wikipedia"] = {"path": str(raw / "wikipedia")}
    manifests = []
    for store, kills in (("whole", []), ("killed", ["extract/", "write/"])):
        config = {"kind": "clean", "name": "small", "sources": sources}
        config["storage"] = {"url": f"file://{tmp_path}/{store}"}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
        storage = Storage(CleanConfig.model_validate(config).storage)
        for wanted in kills:
            _kill_when(tmp_path / "job.yaml", ray_head, storage, wanted)
            assert CorpusManifest.find(storage, "small") is None
        _start(tmp_path / "job.yaml", ray_head).wait()
        manifests.append(CorpusManifest.find(storage, "small"))
        assert not any(".work" in path for path in storage.list("corpora"))
    assert manifests[0] is not None
    assert manifests[0] == manifests[1]


def _start(job: Path, head: Head) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llama_ray.job", str(job)]
    environment = os.environ | {"RAY_ADDRESS": head.address}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def _kill_when(job: Path, head: Head, storage: Storage, wanted: str) -> None:
    """As soon as a file appears whose path contains `wanted`."""
    driver, deadline = _start(job, head), time.monotonic() + 60
    while not any(wanted in path for path in storage.list("corpora")):
        assert time.monotonic() < deadline, f"no {wanted} appeared"
        assert driver.poll() is None, "the job ended before it could be killed"
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()


@pytest.mark.slow
def test_a_full_disk_is_told_and_a_second_run_completes(
    ray_cluster: Head, raw: Path, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 40_960))
    config = CleanConfig.model_validate(
        {
            "name": "full",
            "storage": {"url": f"file://{small_disk}/store"},
            "sources": {"wikipedia": {"path": str(raw / "wikipedia")}},
        }
    )
    with pytest.raises(UserError, match=r"^storage\.url: .* no space left"):
        clean(config)
    ballast.unlink()
    clean(config)
    assert len(kept(config)["wikipedia"]) == 40
