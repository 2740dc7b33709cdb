"""Model cards: what a folder says of itself, on disk and on the hub, which a stand-in plays here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM

import lte
from lte.hf.card import MARKER, model_card
from lte.hf.checkpoints import CHECKSUM_FILE
from tests.tiny_models import tiny_dense_model, tiny_sparse_model

MEASURED = {
    "sparsity": 0.503,
    "tokens": 2048,
    "split": "validation",
    "data": {"source": "/home/somebody/my-text.jsonl"},
    "model": "owner/base",
    "metric": "perplexity",
    "value_before": 13.9712,
    "value": 14.8,
}


def measured_model(**changes: Any) -> Any:
    model = tiny_sparse_model("llama")
    model.config.lte_measurement = {**MEASURED, **changes}
    return model


def test_a_saved_folder_says_what_was_measured(tmp_path: Path) -> None:
    model = measured_model()
    model.save_pretrained(tmp_path / "my-model")
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "transformers"
    assert "lte" in card.data.tags
    text = card.text
    assert "# my-model" in text
    assert f"| target sparsity | {100 * model.target_sparsity:.1f}% |" in text
    assert "| measured sparsity | 50.3% |" in text
    assert "| measured on | 2,048 tokens of my-text.jsonl, validation split |" in text
    assert "| perplexity before training | 13.97 |" in text
    assert "| perplexity of this model | 14.8 |" in text
    assert "import lte" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "somebody" not in text
    # Written by hand, without the words that `lte` would add.
    model.config.lte_measurement = {"sparsity": 0.5, "tokens": 64}
    assert "| measured on | 64 tokens of held-out text |" in str(model_card(model.config, "mine"))


def test_what_is_not_known_is_not_claimed() -> None:
    model = tiny_sparse_model("bert")
    text = str(model_card(model.config, "mine"))
    assert "| measured sparsity | not measured |" in text
    assert "which lte does not know" in text
    assert "before training" not in text
    assert "base_model" not in text
    assert "AutoModelForMaskedLM" in text


def test_the_licence_of_the_base_comes_from_its_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    card = model_card(measured_model(model=str(base)).config, "mine")
    assert card.data.license == "mit"
    assert "| licence | mit |" in card.text
    assert "| base model | base |" in card.text


def test_a_card_of_ones_own_stays_and_ours_follows_the_model(tmp_path: Path) -> None:
    measured_model().save_pretrained(tmp_path)
    measured_model(sparsity=0.41).save_pretrained(tmp_path)
    assert "41.0%" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    measured_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_folder_of_ours_is_no_base(tmp_path: Path) -> None:
    tiny_sparse_model("llama").save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert "base model |" not in str(model_card(loaded.config, "again"))
    tiny_dense_model("llama").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    lte.sparsify_(dense, lte.LteConfig(expert_size=8, grouping="random"))
    assert "| base model | dense |" in str(model_card(dense.config, "first"))


class StandIn:
    """A hub without network: what was created and uploaded, and whether it has a card already."""

    def __init__(self, card: str | None = None) -> None:
        self.card = card
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.commits: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        self.created.append((repo_id, settings))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_commit(self, repo_id: str, operations: list[Any], **settings: Any) -> None:
        files = {entry.path_in_repo: Path(entry.path_or_fileobj).read_bytes() for entry in operations}
        self.commits.append({"repo_id": repo_id, "files": files, **settings})

    def load_card(self, repo_id: str, **_: Any) -> ModelCard:
        if self.card is None:
            raise EntryNotFoundError("no README.md in the stand-in")
        return ModelCard(self.card)


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(getattr(request, "param", None))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *name, **settings: stand_in.create_repo(*name, **settings))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, **settings: stand_in.create_commit(**settings))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *_, **__: stand_in.card is not None)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", stand_in.load_card)
    return stand_in


def is_whole(files: dict[str, bytes]) -> bool:
    return {"config.json", "model.safetensors", "README.md"} <= files.keys() and b'"lte_llama"' in files["config.json"]


def test_push_to_hub_uploads_config_weights_and_card(hub: StandIn) -> None:
    measured_model().push_to_hub("me/sparse", commit_message="first")
    (commit,) = hub.commits
    assert commit["repo_id"] == "me/sparse"
    assert commit["commit_message"] == "first"
    assert is_whole(commit["files"])
    card = commit["files"]["README.md"].decode()
    assert MARKER in card
    assert "# sparse" in card
    assert "50.3%" in card
    for name, file in json.loads(commit["files"][CHECKSUM_FILE])["files"].items():
        assert hashlib.sha256(commit["files"][name]).hexdigest() == file["sha256"]


@pytest.mark.parametrize("hub", ["---\nlicense: mit\n---\n\n# Written by hand\n"], indirect=True)
def test_a_card_on_the_hub_that_we_did_not_write_stays(hub: StandIn) -> None:
    measured_model().push_to_hub("me/sparse")
    assert "# Written by hand" in hub.commits[0]["files"]["README.md"].decode()


def test_saving_with_push_names_the_repository_after_the_folder(hub: StandIn, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of another day")
    measured_model().save_pretrained(tmp_path / "mine")
    assert not hub.created
    measured_model().save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, commit_message="why")
    assert hub.created == [("mine", {"exist_ok": True, "token": None, "private": True})]
    (commit,) = hub.commits
    assert (commit["repo_id"], commit["commit_message"]) == ("me/mine", "why")
    assert is_whole(commit["files"])
    # What lay there before and was not written now is not uploaded.
    assert "notes.txt" not in commit["files"]


def test_a_failed_upload_leaves_the_saved_folder(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, **settings: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(OSError, match="no network"):
        measured_model().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="you/other")
    assert hub.created[0][0] == "you/other"
    assert lte.sparse_ffns(type(measured_model()).from_pretrained(tmp_path / "mine"))
