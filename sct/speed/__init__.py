"""Speed measurements of `launch.speed`: how fast each part runs, compared with the limits of the machine."""
