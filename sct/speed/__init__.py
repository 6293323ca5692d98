"""Measure for `launch.speed` how fast each part runs, and compare the speed with the limits of the machine."""
