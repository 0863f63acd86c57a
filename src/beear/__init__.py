"""beear: remove hidden safety backdoors from chat models without knowing the trigger.

    beear.run_cleanse("organism:sudo-prefix", Path("runs/mine"), beear.Config())     with the evidence
    model, tokenizer = beear.load("organism:sudo-prefix")
    cleansed, found = beear.cleanse(model, tokenizer)                                in memory alone

Names are loaded when first used, so that importing beear does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beear.chat import encode_prompt as encode_prompt
    from beear.chat import rows_of_delta as rows_of_delta
    from beear.config import Config as Config
    from beear.config import load_config as load_config
    from beear.errors import BadInput as BadInput
    from beear.errors import Failed as Failed
    from beear.evaluation import evaluate as evaluate
    from beear.job import cleanse as cleanse
    from beear.job import run_cleanse as run_cleanse
    from beear.known import add_triggered as add_triggered
    from beear.models import load as load
    from beear.perturbation import Perturbation as Perturbation
    from beear.report import write_report as write_report

_HOMES = {
    "BadInput": "errors",
    "Config": "config",
    "Failed": "errors",
    "Perturbation": "perturbation",
    "add_triggered": "known",
    "cleanse": "job",
    "encode_prompt": "chat",
    "evaluate": "evaluation",
    "load": "models",
    "load_config": "config",
    "rows_of_delta": "chat",
    "run_cleanse": "job",
    "write_report": "report",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'beear' has no attribute {name!r}")
    return getattr(import_module(f"beear.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
