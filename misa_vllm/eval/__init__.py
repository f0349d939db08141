"""Fidelity tools: what MISA keeps of DSA on a checkpoint (`misa-eval`)."""
