"""Sign a run's folder, and check it: OpenSSF model-signing (extra `sign`), offline, with a key of one's own.

All of it is signed but checkpoints, the log of events and the signature. What is added to a run later changes it,
so it is signed anew: sign last.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beear.errors import BadInput, first_line
from beear.outputs import check_output_files
from beear.runs import read_results
from beear.verdict import holds, sentence

SIGNATURE = "run.sig"
UNSIGNED = (SIGNATURE, f".{SIGNATURE}.new", ".lock", "checkpoints", "events.jsonl")
PASSWORD = "BEEAR_KEY_PASSWORD"


def sign_run(run: Path, key: Path) -> Path:
    """Write RUN/run.sig with an elliptic curve private key (PEM; its password, if any, in BEEAR_KEY_PASSWORD).

    Raises BadInput if the target was not met, if a file was changed since, or if the key is none.
    """
    run = run.resolve()  # the library takes no link for a folder
    results = read_results(run)
    if not holds(results):
        raise BadInput(f"{run} was not signed: {sentence(results)}")
    check_output_files(run, results)
    signing, hashing = _library()
    password = os.environ.get(PASSWORD)
    config = _with_key(
        lambda: signing.signing.Config().use_elliptic_key_signer(
            private_key=key, password=password.encode() if password else None
        ),
        key,
    )
    new, place = run / f".{SIGNATURE}.new", run / SIGNATURE
    try:
        config.set_hashing_config(_hashing(hashing)).sign(run, new)
        new.replace(place)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot sign {run}: {first_line(error)}") from error
    return place


def check_signature(run: Path, key: Path) -> None:
    """Raise BadInput unless RUN/run.sig was made with this public key's partner over what the run holds now."""
    run = run.resolve()
    if not (run / SIGNATURE).is_file():
        raise BadInput(f"{run} is not signed: it has no {SIGNATURE}; `beear sign` makes one")
    signing, hashing = _library()
    config = _with_key(lambda: signing.verifying.Config().use_elliptic_key_verifier(public_key=key), key)
    try:
        config.set_hashing_config(_hashing(hashing)).verify(run, run / SIGNATURE)
    except Exception as error:  # a signature is untrusted input, and the library's errors for it have no base
        raise BadInput(f"the signature of {run} does not hold, do not trust it: {first_line(error)}") from error


def _hashing(hashing: Any) -> Any:
    """What is hashed; files that git would pass over are."""
    return hashing.Config().set_ignored_paths(paths=UNSIGNED, ignore_git_paths=False)


def _library() -> tuple[Any, Any]:
    try:
        import model_signing
        from model_signing import hashing
    except ImportError as error:
        raise BadInput("signing needs model-signing; install beear with its extra sign") from error
    return model_signing, hashing


def _with_key(make: Callable[[], Any], key: Path) -> Any:
    if not key.exists():  # it may be a pipe
        raise BadInput(f"no key file {key}")
    try:
        return make()
    except AttributeError as error:  # of another kind of key
        raise BadInput(f"cannot use the key {key}: give an elliptic curve key in PEM") from error
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"cannot use the key {key}: {first_line(error)}; give an elliptic curve key in PEM") from error
