"""Instruction data from captions and boxes, written by a text-only teacher, and checked for truth."""

from llava_lab.instructions.claims import Claim, false_sentences, read_claims
from llava_lab.instructions.context import KINDS, TAUGHT, Box, Context, Kind, of_scene, read_kinds
from llava_lab.instructions.existing import check_rows
from llava_lab.instructions.experiment import check_pays, shipped_check_pays
from llava_lab.instructions.facts import Facts, Wanted
from llava_lab.instructions.generate import Plan, estimate_generation, generate
from llava_lab.instructions.readers import Coco, World, read_folder, read_jsonl
from llava_lab.instructions.rules import RuleTeacher
from llava_lab.instructions.teachers import LocalTeacher, ServerTeacher, Teacher, Told

__all__ = [
    "Box",
    "Claim",
    "Coco",
    "Context",
    "Facts",
    "KINDS",
    "Kind",
    "LocalTeacher",
    "Plan",
    "RuleTeacher",
    "ServerTeacher",
    "TAUGHT",
    "Teacher",
    "Told",
    "Wanted",
    "World",
    "check_pays",
    "check_rows",
    "estimate_generation",
    "false_sentences",
    "generate",
    "of_scene",
    "read_claims",
    "read_folder",
    "read_jsonl",
    "read_kinds",
    "shipped_check_pays",
]
