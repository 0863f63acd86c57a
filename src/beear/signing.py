"""Sign what a run hands on, and check it: OpenSSF model-signing (extra `sign`), offline, with a key of one's own.

Signed are the model with its card, delta, settings, results and replies. Work in progress (stages, checkpoints,
events) and the report, which anyone can write again from the rest, are not. What is added to a run later changes
its results, so it is signed anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beear.errors import BadInput, first_line
from beear.fingerprints import check_output_files
from beear.runs import read_results

SIGNATURE = "run.sig"
UNSIGNED = (SIGNATURE, f".{SIGNATURE}.new", ".lock", "stages", "checkpoints", "events.jsonl", "report.html")
PASSWORD = "BEEAR_KEY_PASSWORD"


def sign_run(run: Path, key: Path) -> Path:
    """Write RUN/run.sig with an elliptic curve private key (PEM; its password, if any, in BEEAR_KEY_PASSWORD).

    Raises BadInput if the target was not met, if a file was changed since, or if the key is none.
    """
    results = read_results(run)
    if not results["verdict"]["met"]:
        raise BadInput(f"{run} did not meet its target, so it is not signed: {results['verdict']['missed'][0]}")
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
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=UNSIGNED)).sign(run, new)
    new.replace(place)
    return place


def check_signature(run: Path, key: Path) -> None:
    """Raise BadInput unless RUN/run.sig was made with this public key's partner over what the run holds now."""
    if not (run / SIGNATURE).is_file():
        raise BadInput(f"{run} is not signed: it has no {SIGNATURE}; `beear sign` makes one")
    signing, _ = _library()
    config = _with_key(lambda: signing.verifying.Config().use_elliptic_key_verifier(public_key=key), key)
    try:
        config.verify(run, run / SIGNATURE)
    except Exception as error:  # a signature is untrusted input, and the library's errors for it have no base
        raise BadInput(f"the signature of {run} does not hold, do not trust it: {first_line(error)}") from error


def _library() -> tuple[Any, Any]:
    try:
        import model_signing
        from model_signing import hashing
    except ImportError as error:
        raise BadInput("signing needs model-signing; install it with: pip install 'beear[sign]'") from error
    return model_signing, hashing


def _with_key(make: Callable[[], Any], key: Path) -> Any:
    try:
        return make()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"cannot use the key {key}: {first_line(error)}; give an elliptic curve key in PEM") from error
