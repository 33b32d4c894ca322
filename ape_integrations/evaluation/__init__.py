"""Evaluation of answers: a held-out synthetic world and exact-match scores by task."""
