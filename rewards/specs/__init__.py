"""Grader specs in the public fine-tuning shape: their parts, which `rlsys.rewards.graders` puts together."""
