"""How fast the parts run, beside what the machine can do: the measurements of `launch.speed`."""
