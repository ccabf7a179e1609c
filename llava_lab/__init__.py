"""Look inside LLaVA: ask a model about a picture, and see which patches each word came from.

    import llava_lab as ll
    lab = ll.load("tiny")
    run = lab.ask("picture.png", "What color is the car?")
    relevance = ll.attribute(lab, run, method="rollout")

Names are resolved on first use (PEP 562), so this import costs nothing and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_lab.attribution import METHODS as METHODS
    from llava_lab.attribution import ask_and_attribute as ask_and_attribute
    from llava_lab.attribution import attribute as attribute
    from llava_lab.attribution import head_maps as head_maps
    from llava_lab.attribution import image_share as image_share
    from llava_lab.checks import check_answer as check_answer
    from llava_lab.comparison import compare_connectors as compare_connectors
    from llava_lab.comparison import linear_effect as linear_effect
    from llava_lab.connectors import connector as connector
    from llava_lab.connectors import export as export
    from llava_lab.connectors import linearize as linearize
    from llava_lab.connectors import local_linearity as local_linearity
    from llava_lab.connectors import new_connector as new_connector
    from llava_lab.connectors import read_projector as read_projector
    from llava_lab.connectors import save as save
    from llava_lab.connectors import write_projector as write_projector
    from llava_lab.errors import LabError as LabError
    from llava_lab.geometry import PictureMap as PictureMap
    from llava_lab.geometry import View as View
    from llava_lab.instructions.generate import generate as generate
    from llava_lab.interventions import ablate_tokens as ablate_tokens
    from llava_lab.interventions import ablated as ablated
    from llava_lab.interventions import ask_without as ask_without
    from llava_lab.interventions import attribution_patch as attribution_patch
    from llava_lab.interventions import circuit as circuit
    from llava_lab.interventions import erase as erase
    from llava_lab.interventions import erased as erased
    from llava_lab.interventions import interchange as interchange
    from llava_lab.interventions import knocked_out as knocked_out
    from llava_lab.interventions import knockout as knockout
    from llava_lab.interventions import knockout_sweep as knockout_sweep
    from llava_lab.interventions import mean_difference as mean_difference
    from llava_lab.interventions import patch as patch
    from llava_lab.interventions import patch_nodes as patch_nodes
    from llava_lab.interventions import positive_control as positive_control
    from llava_lab.interventions import steer as steer
    from llava_lab.interventions import steered as steered
    from llava_lab.judging import compare as compare
    from llava_lab.judging import faithfulness as faithfulness
    from llava_lab.judging import ground_truth as ground_truth
    from llava_lab.judging import leaderboard as leaderboard
    from llava_lab.judging import prune as prune
    from llava_lab.judging import prune_sweep as prune_sweep
    from llava_lab.judging import sanity as sanity
    from llava_lab.judging import shipped_ablation as shipped_ablation
    from llava_lab.judging import shipped_leaderboard as shipped_leaderboard
    from llava_lab.judging import shipped_pruning as shipped_pruning
    from llava_lab.models import CONNECTORS as CONNECTORS
    from llava_lab.models import ForeignConnector as ForeignConnector
    from llava_lab.models import Lab as Lab
    from llava_lab.models import load as load
    from llava_lab.probes import JacobianLens as JacobianLens
    from llava_lab.probes import TunedLens as TunedLens
    from llava_lab.probes import activation_map as activation_map
    from llava_lab.probes import fit_jacobian as fit_jacobian
    from llava_lab.probes import hallucination_check as hallucination_check
    from llava_lab.probes import linear_probe as linear_probe
    from llava_lab.probes import logit_lens as logit_lens
    from llava_lab.probes import naming_share as naming_share
    from llava_lab.probes import nearest_words as nearest_words
    from llava_lab.probes import patch_labels as patch_labels
    from llava_lab.probes import sinks as sinks
    from llava_lab.probes import token_geometry as token_geometry
    from llava_lab.probes import train_lens as train_lens
    from llava_lab.remote import BlackBox as BlackBox
    from llava_lab.remote import estimate as estimate
    from llava_lab.results import Ablation as Ablation
    from llava_lab.results import Circuit as Circuit
    from llava_lab.results import Comparison as Comparison
    from llava_lab.results import ControlRates as ControlRates
    from llava_lab.results import Effect as Effect
    from llava_lab.results import Faithfulness as Faithfulness
    from llava_lab.results import FlowSweep as FlowSweep
    from llava_lab.results import GroundTruth as GroundTruth
    from llava_lab.results import HallucinationCheck as HallucinationCheck
    from llava_lab.results import HeadMaps as HeadMaps
    from llava_lab.results import Interchange as Interchange
    from llava_lab.results import Leaderboard as Leaderboard
    from llava_lab.results import LinearEffect as LinearEffect
    from llava_lab.results import Linearized as Linearized
    from llava_lab.results import LocalLinearity as LocalLinearity
    from llava_lab.results import LogitLens as LogitLens
    from llava_lab.results import NamingShare as NamingShare
    from llava_lab.results import NearestWords as NearestWords
    from llava_lab.results import NodeScores as NodeScores
    from llava_lab.results import PatchGrid as PatchGrid
    from llava_lab.results import ProbeScores as ProbeScores
    from llava_lab.results import Pruning as Pruning
    from llava_lab.results import Relevance as Relevance
    from llava_lab.results import Run as Run
    from llava_lab.results import Sanity as Sanity
    from llava_lab.results import Sinks as Sinks
    from llava_lab.results import Target as Target
    from llava_lab.results import TokenGeometry as TokenGeometry
    from llava_lab.results import WordActivation as WordActivation
    from llava_lab.session import explore as explore
    from llava_lab.training import train_stage as train_stage

__version__ = "0.1.0"

_HOMES = {
    "load": "llava_lab.models",
    "Lab": "llava_lab.models",
    "BlackBox": "llava_lab.remote",
    "explore": "llava_lab.session",
    "check_answer": "llava_lab.checks",
    "attribute": "llava_lab.attribution",
    "METHODS": "llava_lab.attribution",
    "ask_and_attribute": "llava_lab.attribution",
    "ask_without": "llava_lab.interventions",
    "image_share": "llava_lab.attribution",
    "head_maps": "llava_lab.attribution",
    "sanity": "llava_lab.judging",
    "faithfulness": "llava_lab.judging",
    "ground_truth": "llava_lab.judging",
    "compare": "llava_lab.judging",
    "estimate": "llava_lab.remote",
    "leaderboard": "llava_lab.judging",
    "prune": "llava_lab.judging",
    "prune_sweep": "llava_lab.judging",
    "shipped_ablation": "llava_lab.judging",
    "shipped_leaderboard": "llava_lab.judging",
    "shipped_pruning": "llava_lab.judging",
    "logit_lens": "llava_lab.probes",
    "activation_map": "llava_lab.probes",
    "hallucination_check": "llava_lab.probes",
    "naming_share": "llava_lab.probes",
    "train_lens": "llava_lab.probes",
    "TunedLens": "llava_lab.probes",
    "JacobianLens": "llava_lab.probes",
    "fit_jacobian": "llava_lab.probes",
    "nearest_words": "llava_lab.probes",
    "linear_probe": "llava_lab.probes",
    "token_geometry": "llava_lab.probes",
    "patch_labels": "llava_lab.probes",
    "sinks": "llava_lab.probes",
    "knockout": "llava_lab.interventions",
    "knockout_sweep": "llava_lab.interventions",
    "ablate_tokens": "llava_lab.interventions",
    "patch": "llava_lab.interventions",
    "patch_nodes": "llava_lab.interventions",
    "attribution_patch": "llava_lab.interventions",
    "circuit": "llava_lab.interventions",
    "interchange": "llava_lab.interventions",
    "steer": "llava_lab.interventions",
    "erase": "llava_lab.interventions",
    "knocked_out": "llava_lab.interventions",
    "ablated": "llava_lab.interventions",
    "steered": "llava_lab.interventions",
    "erased": "llava_lab.interventions",
    "mean_difference": "llava_lab.interventions",
    "positive_control": "llava_lab.interventions",
    "Run": "llava_lab.results",
    "Relevance": "llava_lab.results",
    "Target": "llava_lab.results",
    "HeadMaps": "llava_lab.results",
    "Effect": "llava_lab.results",
    "FlowSweep": "llava_lab.results",
    "NodeScores": "llava_lab.results",
    "Circuit": "llava_lab.results",
    "Interchange": "llava_lab.results",
    "PatchGrid": "llava_lab.results",
    "ControlRates": "llava_lab.results",
    "Faithfulness": "llava_lab.results",
    "GroundTruth": "llava_lab.results",
    "Comparison": "llava_lab.results",
    "Leaderboard": "llava_lab.results",
    "Sanity": "llava_lab.results",
    "LogitLens": "llava_lab.results",
    "WordActivation": "llava_lab.results",
    "HallucinationCheck": "llava_lab.results",
    "NamingShare": "llava_lab.results",
    "NearestWords": "llava_lab.results",
    "ProbeScores": "llava_lab.results",
    "Sinks": "llava_lab.results",
    "Pruning": "llava_lab.results",
    "TokenGeometry": "llava_lab.results",
    "connector": "llava_lab.connectors",
    "new_connector": "llava_lab.connectors",
    "CONNECTORS": "llava_lab.models",
    "linearize": "llava_lab.connectors",
    "local_linearity": "llava_lab.connectors",
    "read_projector": "llava_lab.connectors",
    "write_projector": "llava_lab.connectors",
    "save": "llava_lab.connectors",
    "export": "llava_lab.connectors",
    "ForeignConnector": "llava_lab.models",
    "linear_effect": "llava_lab.comparison",
    "compare_connectors": "llava_lab.comparison",
    "train_stage": "llava_lab.training",
    "generate": "llava_lab.instructions",
    "Ablation": "llava_lab.results",
    "Linearized": "llava_lab.results",
    "LocalLinearity": "llava_lab.results",
    "LinearEffect": "llava_lab.results",
    "PictureMap": "llava_lab.geometry",
    "View": "llava_lab.geometry",
    "LabError": "llava_lab.errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"llava_lab has no {name!r}; its public names are {', '.join(_HOMES)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
