"""Inspect a model: find its convolutions and linear layers, their geometry and cost, and edit its torch.fx graph."""
