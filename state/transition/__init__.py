"""ST, the State Transition model: a set of control cells in, the perturbed set out.

``encoders.py`` -> ``backbone.py`` -> ``heads.py``, joined in ``model.py``; ``features.py`` reads
what is known of a perturbation; ``predict.py`` runs a trained model over batches.
"""
