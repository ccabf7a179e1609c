"""What a model was made for: the words it reads, the pictures it was trained on, and what to say of a question outside them."""

from llava_lab.models.scope.pictures import Familiar, read_features
from llava_lab.models.scope.scope import Scope, scope_of
from llava_lab.models.scope.words import fold, rules, words_of

__all__ = [
    "Familiar",
    "Scope",
    "fold",
    "rules",
    "read_features",
    "scope_of",
    "words_of",
]
