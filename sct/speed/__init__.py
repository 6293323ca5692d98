"""Measure the speed of training, inference and data loading for `launch.speed`, and compare it with machine limits."""
