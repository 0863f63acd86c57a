"""Put a cleansed model on the Hub, with its card and its evidence."""

from __future__ import annotations

from pathlib import Path

from beear.card import hub_name
from beear.errors import BadInput, Failed, first_line, in_one_line
from beear.outputs import check_output_files, handed_on
from beear.runs import read_results, read_settings
from beear.verdict import holds, sentence

EVIDENCE = ("results.json", "config.yaml")
"""Files of the run that go along; not the replies, nor the report that shows some: they answer harmful requests."""


def push(run: Path, repo: str, *, private: bool = True) -> str:
    """Upload RUN/model and its evidence to `repo` ("owner/name"); returns its address. The token is HF_TOKEN's.

    Files of another model in the repository are deleted; its history keeps them.

    Raises BadInput if the target was not met, if a file was changed since, or if nobody else could load the model.
    """
    results, settings = read_results(run), read_settings(run)
    if not holds(results):
        raise BadInput(f"the model of {run} is not for use. {sentence(results)}")
    base = hub_name(settings["model"])
    if not settings["merge"] and base is None:
        raise BadInput(f"the adapter in {run} needs {settings['model']}, which others lack; cleanse it with --merge")
    if not settings["merge"] and repo == base:
        raise BadInput(f"the adapter needs {repo} as it is; push to another name, or cleanse it with --merge")
    check_output_files(run, results)
    folder = run / results["model_folder"]
    files = {p.relative_to(folder): p for p in handed_on(folder)}
    files |= {Path("evidence") / name: run / name for name in EVIDENCE}
    return _upload(files, repo, private)


WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")
SETTINGS = (
    *("adapter_config.json", "config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"),
    *("tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)


def is_of_a_model(name: str) -> bool:
    """Whether a file of a repository belongs to a model: an older one's would be loaded in this one's place, or beside.

    An adapter's settings, for example, beside full weights.
    """
    return "/" not in name and (name in SETTINGS or name.endswith(WEIGHTS))


def _upload(files: dict[Path, Path], repo: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    if repo.count("/") != 1:
        raise BadInput(f"{repo!r} is no Hub repository; write it as owner/name")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        new = {str(there): CommitOperationAdd(str(there), str(here)) for there, here in files.items()}
        old = [name for name in api.list_repo_files(repo) if name not in new and is_of_a_model(name)]
        commit = api.create_commit(
            repo,
            [*new.values(), *(CommitOperationDelete(name) for name in old)],
            commit_message="Model cleansed with beear, and its evidence",
        )
    except LocalTokenNotFoundError as error:
        raise BadInput("the Hub wants a token; set HF_TOKEN to one that may write") from error
    except HFValidationError as error:
        raise BadInput(f"{repo!r} is no Hub repository: {first_line(error)}") from error
    except Exception as error:  # the client's errors for a lost or refused connection have no base of their own
        raise Failed(f"the Hub did not take {repo}: {in_one_line(error)}") from error
    return str(commit.repo_url)
