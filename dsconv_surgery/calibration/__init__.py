"""Fit factors to calibration images: the layer outputs of the dense network are the targets, layer by layer."""
