"""SE, the State Embedding model: a cell in, 682 numbers out (672 of the cell, 10 of its dataset).

``vocabulary.py`` knows the genes, ``sequence.py`` makes sequences of counts; ``tokens.py`` ->
``backbone.py`` -> ``heads.py``, joined in ``model.py``; ``objective.py`` is what is minimised.
"""
