"""Names of modules and parameters: transformers 4, transformers 5 and checkpoint files, as one.

transformers 5 renames and fuses tensors as it loads them, so a checkpoint, an adapter trained on
transformers 4 and one trained on 5 can each call the same weight something else. Here all of them
are brought into one space, the parameter names of the current model, by a table of data that
``scripts/names/generate.py`` takes from transformers. At run time only the standard library is
needed.
"""

from regraft.names.namemap import NameMap
from regraft.names.pieces import Piece
from regraft.names.table import class_for_task, classes_of

__all__ = ["NameMap", "Piece", "class_for_task", "classes_of"]
