"""Define the layers that the model families share. Each layer names the axes of its parameters (see `sct.nn.axes`)."""
