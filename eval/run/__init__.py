"""Evaluation of one model on one dataset: which job, on which scenes, predicted, stored and scored."""
