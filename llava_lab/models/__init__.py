"""Loading LLaVA models and asking them."""

from llava_lab.models.black_box import BlackBox as BlackBox
from llava_lab.models.card import Card as Card
from llava_lab.models.lab import Lab as Lab
from llava_lab.models.loading import load as load
from llava_lab.models.pictures import read_picture as read_picture
from llava_lab.models.placement import choose_device as choose_device
from llava_lab.models.prompts import PROMPTS as PROMPTS
from llava_lab.models.prompts import build_prompt as build_prompt
